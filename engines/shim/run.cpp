// Plain C functions over the part of TensorRT that runs engines: deserialise, describe, bind, enqueue. Compiled into the shim of
// enterprise TensorRT, whose engines have plugins. No exception leaves a function. The Rust side is
// engines/src/tensorrt/sys.rs; keep the two in step and raise MLAC_TRT_RUN_ABI when a signature changes.

#include <cstddef>
#include <cstdint>
#include <memory>

#include "shim.h"

#define MLAC_TRT_RUN_ABI 1

namespace
{
using CreateRuntime = void* (*) (void* logger, int32_t version);

// Members are destroyed in reverse order: engine, runtime, logger.
struct Engine
{
    Engine(LogFunction function, void* user)
        : logger(function, user)
    {
    }
    Logger logger;
    std::unique_ptr<trt::IRuntime> runtime;
    std::unique_ptr<trt::ICudaEngine> engine;
};

int32_t copied(trt::Dims const& shape, int64_t* out)
{
    if (shape.nbDims < 0 || shape.nbDims > 8)
    {
        return -1;
    }
    for (int32_t i = 0; i < shape.nbDims; ++i)
    {
        out[i] = shape.d[i];
    }
    return shape.nbDims;
}
} // namespace

MLAC_EXPORT int32_t mlac_trt_run_abi()
{
    return MLAC_TRT_RUN_ABI;
}

// Null when TensorRT does not take the bytes; the log says why. Plugins must be registered before.
MLAC_EXPORT Engine* mlac_trt_engine_open(
    void* createRuntime, void const* bytes, uint64_t size, LogFunction function, void* user)
{
    try
    {
        auto result = std::make_unique<Engine>(function, user);
        auto make = reinterpret_cast<CreateRuntime>(createRuntime);
        result->runtime.reset(static_cast<trt::IRuntime*>(make(&result->logger, NV_TENSORRT_VERSION)));
        if (!result->runtime)
        {
            return nullptr;
        }
        result->engine.reset(result->runtime->deserializeCudaEngine(bytes, static_cast<std::size_t>(size)));
        return result->engine ? result.release() : nullptr;
    }
    catch (...)
    {
        return nullptr;
    }
}

MLAC_EXPORT void mlac_trt_engine_close(Engine* engine)
{
    delete engine;
}

MLAC_EXPORT int32_t mlac_trt_engine_tensor_count(Engine* engine)
{
    return engine->engine->getNbIOTensors();
}

// 1: an input, 2: an output, 0: none, or one that is not linear in device memory, as all of mlac's are.
MLAC_EXPORT int32_t mlac_trt_engine_tensor(Engine* engine, int32_t index, MlacTrtTensor* out)
{
    trt::ICudaEngine const& e = *engine->engine;
    *out = {};
    out->name = e.getIOTensorName(index);
    if (out->name == nullptr)
    {
        return 0;
    }
    out->dtype = static_cast<int32_t>(e.getTensorDataType(out->name));
    out->rank = copied(e.getTensorShape(out->name), out->dims);
    bool const linear = e.getTensorFormat(out->name) == trt::TensorFormat::kLINEAR
        && e.getTensorLocation(out->name) == trt::TensorLocation::kDEVICE;
    if (out->rank < 0 || !linear)
    {
        return 0;
    }
    switch (e.getTensorIOMode(out->name))
    {
    case trt::TensorIOMode::kINPUT: return 1;
    case trt::TensorIOMode::kOUTPUT: return 2;
    default: return 0;
    }
}

// The input whose memory an output must have, or null when the engine names none.
MLAC_EXPORT char const* mlac_trt_engine_alias(Engine* engine, char const* output)
{
    return engine->engine->getAliasedInputTensor(output);
}

MLAC_EXPORT int32_t mlac_trt_engine_profile_count(Engine* engine)
{
    return engine->engine->getNbOptimizationProfiles();
}

// Rank and sizes of an input's smallest (0), most usual (1) or largest (2) shape; -1 when there is no such.
MLAC_EXPORT int32_t mlac_trt_engine_profile(
    Engine* engine, char const* input, int32_t profile, int32_t which, int64_t* out)
{
    if (which < 0 || which > 2)
    {
        return -1;
    }
    return copied(
        engine->engine->getProfileShape(input, profile, static_cast<trt::OptProfileSelector>(which)), out);
}

// A context that runs one profile, or null. The profile is chosen in the order of the stream.
MLAC_EXPORT trt::IExecutionContext* mlac_trt_context_open(Engine* engine, int32_t profile, void* stream)
{
    try
    {
        std::unique_ptr<trt::IExecutionContext> context(engine->engine->createExecutionContext());
        if (!context || !context->setOptimizationProfileAsync(profile, static_cast<cudaStream_t>(stream)))
        {
            return nullptr;
        }
        return context.release();
    }
    catch (...)
    {
        return nullptr;
    }
}

MLAC_EXPORT void mlac_trt_context_close(trt::IExecutionContext* context)
{
    delete context;
}

// 1 when the profile takes an input of this shape.
MLAC_EXPORT int32_t mlac_trt_context_shape(
    trt::IExecutionContext* context, char const* input, int32_t rank, int64_t const* sizes)
{
    if (rank < 0 || rank > trt::Dims::MAX_DIMS)
    {
        return 0;
    }
    return context->setInputShape(input, dims(sizes, rank)) ? 1 : 0;
}

// Rank and sizes of a tensor, given the inputs' shapes; -1 when they do not determine them.
MLAC_EXPORT int32_t mlac_trt_context_tensor(trt::IExecutionContext* context, char const* tensor, int64_t* out)
{
    return copied(context->getTensorShape(tensor), out);
}

// 1 when the tensor's memory is at this device address from now on.
MLAC_EXPORT int32_t mlac_trt_context_address(trt::IExecutionContext* context, char const* tensor, uint64_t address)
{
    return context->setTensorAddress(tensor, reinterpret_cast<void*>(address)) ? 1 : 0;
}

// 1 when the run is in the stream.
MLAC_EXPORT int32_t mlac_trt_context_run(trt::IExecutionContext* context, void* stream)
{
    try
    {
        return context->enqueueV3(static_cast<cudaStream_t>(stream)) ? 1 : 0;
    }
    catch (...)
    {
        return 0;
    }
}
