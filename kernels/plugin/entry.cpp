// The library's functions: the two that IPluginRegistry::loadLibrary looks for, and two of mlac's own.
#include "plugin.h"
#include "report.h"

#define MLAC_EXPORT extern "C" __attribute__((visibility("default")))

MLAC_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) noexcept
{
    return mlac::guarded<nvinfer1::IPluginCreatorInterface* const*>(nullptr, nullptr, [&] {
        static mlac::LatentAttentionCreator creator;
        static nvinfer1::IPluginCreatorInterface* const creators[] = {&creator};
        count = 1;
        return creators;
    });
}

MLAC_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) noexcept
{
    mlac::setLoggerFinder(finder);
}

// The TensorRT that the library was compiled for, major * 10000 + minor * 100 + patch. Its virtual tables are those of this major version.
MLAC_EXPORT int32_t mlac_trt_plugin_tensorrt() noexcept
{
    return NV_TENSORRT_MAJOR * 10000 + NV_TENSORRT_MINOR * 100 + NV_TENSORRT_PATCH;
}

// What the library reported last on this thread; empty when nothing was.
MLAC_EXPORT char const* mlac_trt_plugin_last_error() noexcept
{
    return mlac::lastError();
}
