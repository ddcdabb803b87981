#include "report.h"

#include <atomic>
#include <cstdio>

namespace mlac
{
namespace
{
std::atomic<trt::ILoggerFinder*> gFinder{nullptr};

// An array, not a string: it is written when memory may have run out.
thread_local char gLast[1024] = "";
} // namespace

Refused refusal(std::string const& subject, std::string const& expected, std::string const& found, std::string const& fix,
    trt::ErrorCode code)
{
    return Refused(code, subject + ": expected " + expected + ", found " + found + "; fix: " + fix);
}

void report(trt::IErrorRecorder* recorder, trt::ErrorCode code, char const* message) noexcept
{
    std::snprintf(gLast, sizeof gLast, "%s", message);
    if (recorder != nullptr)
    {
        char brief[trt::IErrorRecorder::kMAX_DESC_LENGTH + 1];
        std::snprintf(brief, sizeof brief, "mlac: %s", message);
        recorder->reportError(code, brief);
    }
    try
    {
        trt::ILoggerFinder* finder = gFinder.load();
        trt::ILogger* logger = finder == nullptr ? nullptr : finder->findLogger();
        if (logger != nullptr)
        {
            logger->log(trt::ILogger::Severity::kERROR, gLast);
        }
    }
    catch (...)
    {
        // The recorder and the return value have said it; a finder that throws has no logger.
    }
}

char const* lastError() noexcept
{
    return gLast;
}

void setLoggerFinder(trt::ILoggerFinder* finder) noexcept
{
    gFinder.store(finder);
}
} // namespace mlac
