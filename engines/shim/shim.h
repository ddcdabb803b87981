#pragma once
// What the two sources of the shim share.

#include <cstdint>

#include "NvInfer.h"

#define MLAC_EXPORT extern "C" __attribute__((visibility("default")))

namespace trt = nvinfer1;

using LogFunction = void (*)(void* user, int32_t severity, char const* text);

class Logger : public trt::ILogger
{
public:
    Logger(LogFunction function, void* user)
        : mFunction(function)
        , mUser(user)
    {
    }
    void log(Severity severity, char const* text) noexcept override
    {
        mFunction(mUser, static_cast<int32_t>(severity), text);
    }

private:
    LogFunction mFunction;
    void* mUser;
};

inline trt::Dims dims(int64_t const* values, int32_t rank)
{
    trt::Dims result{};
    result.nbDims = rank;
    for (int32_t i = 0; i < rank; ++i)
    {
        result.d[i] = values[i];
    }
    return result;
}

// One input or output of the network. A dimension of -1 is dynamic; its symbol is its name in the
// ONNX file, null without one.
struct MlacTrtTensor
{
    char const* name;
    int32_t dtype;
    int32_t rank;
    int64_t dims[8];
    char const* symbols[8];
};
