// Errors inside the library are thrown as `Refused`, and never leave it: every function that TensorRT calls is wrapped in `guarded`,
// which reports to the context's error recorder, to TensorRT's logger and to mlac_trt_last_error, and returns a value that says no.
#pragma once

#include <NvInferRuntime.h>

#include <sstream>
#include <stdexcept>
#include <string>

namespace mlac
{
namespace trt = nvinfer1;

class Refused : public std::runtime_error
{
public:
    Refused(trt::ErrorCode code, std::string const& text)
        : std::runtime_error(text)
        , code(code)
    {
    }
    trt::ErrorCode code;
};

// "SUBJECT: expected EXPECTED, found FOUND; fix: FIX", as all of mlac says it.
Refused refusal(std::string const& subject, std::string const& expected, std::string const& found, std::string const& fix,
    trt::ErrorCode code = trt::ErrorCode::kINVALID_ARGUMENT);

template <typename... Parts>
std::string text(Parts const&... parts)
{
    std::ostringstream out;
    (out << ... << parts);
    return out.str();
}

void report(trt::IErrorRecorder* recorder, trt::ErrorCode code, char const* message) noexcept;

// What was reported last on this thread; empty when nothing was.
char const* lastError() noexcept;

void setLoggerFinder(trt::ILoggerFinder* finder) noexcept;

template <typename Result, typename Work>
Result guarded(trt::IErrorRecorder* recorder, Result no, Work work) noexcept
{
    try
    {
        return work();
    }
    catch (Refused const& error)
    {
        report(recorder, error.code, error.what());
    }
    catch (std::exception const& error)
    {
        report(recorder, trt::ErrorCode::kINTERNAL_ERROR, error.what());
    }
    catch (...)
    {
        report(recorder, trt::ErrorCode::kINTERNAL_ERROR, "an exception without a message");
    }
    return no;
}
} // namespace mlac
