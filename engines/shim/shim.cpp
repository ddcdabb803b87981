// Plain C functions over the part of TensorRT that mlac uses: parse an ONNX file, describe
// the network, set profiles and targets, build a serialized engine. Compiled twice: against the headers
// of TensorRT for RTX, and against those of enterprise TensorRT, which has plugins and timing caches
// and builds for the GPU it runs on.
//
// TensorRT's interface is C++ classes with virtual functions, so someone has to be compiled against
// NVIDIA's headers. Nothing is linked: the two entry points come in from the caller, who loaded the
// libraries. No exception leaves a function. The Rust side is engines/src/tensorrt/sys.rs; keep the
// two in step and raise MLAC_TRT_SHIM_ABI when a signature changes.
//
// Running engines is in run.cpp.
//
// No timing cache for RTX: it documents those operations as no-ops since 1.2.
// No strongly-typed flag: networks of both are always strongly typed (enterprise TensorRT since 11).

#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <string>

#include "NvOnnxParser.h"
#include "shim.h"

#define MLAC_TRT_SHIM_ABI 3

namespace
{
using CreateBuilder = void* (*) (void* logger, int32_t version);
using CreateParser = void* (*) (void* network, void* logger, int version);
using GetRegistry = trt::IPluginRegistry* (*) ();

// Members are destroyed in reverse order: parser, network, builder, logger.
struct Build
{
    Build(LogFunction function, void* user)
        : logger(function, user)
    {
    }
    Logger logger;
    std::unique_ptr<trt::IBuilder> builder;
    std::unique_ptr<trt::INetworkDefinition> network;
    std::unique_ptr<nvonnxparser::IParser> parser;
};

struct Config
{
#ifdef TRT_MAJOR_ENTERPRISE
    std::unique_ptr<trt::ITimingCache> timing; // outlives the configuration, which uses it
#endif
    std::unique_ptr<trt::IBuilderConfig> config;
    trt::IOptimizationProfile* profile{nullptr}; // owned by the builder
};
} // namespace

struct MlacTrtParseError
{
    int32_t code;
    int32_t node;
    char const* text;
    char const* nodeName;
    char const* nodeOperator;
};

MLAC_EXPORT int32_t mlac_trt_shim_abi()
{
    return MLAC_TRT_SHIM_ABI;
}

// The version of the headers, major * 10000 + minor * 100 + patch: the libraries must match it.
MLAC_EXPORT int32_t mlac_trt_shim_version()
{
    return NV_TENSORRT_MAJOR * 10000 + NV_TENSORRT_MINOR * 100 + NV_TENSORRT_PATCH;
}

// The name of the index-th plugin that TensorRT has registered by itself, or null. A node of such a
// name must never reach the parser: it would make a plugin layer, which TensorRT for RTX cannot
// hold, and the process ends.
MLAC_EXPORT char const* mlac_trt_plugin_name(void* getRegistry, int32_t index)
{
    trt::IPluginRegistry* registry = reinterpret_cast<GetRegistry>(getRegistry)();
    int32_t count = 0;
    trt::IPluginCreatorInterface* const* creators = registry == nullptr ? nullptr : registry->getAllCreators(&count);
    if (creators == nullptr || index < 0 || index >= count)
    {
        return nullptr;
    }
    if (std::strcmp(creators[index]->getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE") != 0)
    {
        return "";
    }
    return static_cast<trt::IPluginCreatorV3One const*>(creators[index])->getPluginName();
}

// Null when TensorRT refuses to make a builder, a network or a parser; the log says why.
MLAC_EXPORT Build* mlac_trt_open(void* createBuilder, void* createParser, LogFunction function, void* user)
{
    try
    {
        auto build = std::make_unique<Build>(function, user);
        auto makeBuilder = reinterpret_cast<CreateBuilder>(createBuilder);
        auto makeParser = reinterpret_cast<CreateParser>(createParser);
        build->builder.reset(static_cast<trt::IBuilder*>(makeBuilder(&build->logger, NV_TENSORRT_VERSION)));
        if (!build->builder)
        {
            return nullptr;
        }
        build->network.reset(build->builder->createNetworkV2(0));
        if (!build->network)
        {
            return nullptr;
        }
        build->parser.reset(
            static_cast<nvonnxparser::IParser*>(makeParser(build->network.get(), &build->logger, NV_ONNX_PARSER_VERSION)));
        return build->parser ? build.release() : nullptr;
    }
    catch (...)
    {
        return nullptr;
    }
}

MLAC_EXPORT void mlac_trt_close(Build* build)
{
    delete build;
}

// 1 when the whole file was understood. External data is read from beside the file.
MLAC_EXPORT int32_t mlac_trt_parse_file(Build* build, char const* path)
{
    try
    {
        return build->parser->parseFromFile(path, static_cast<int>(trt::ILogger::Severity::kWARNING)) ? 1 : 0;
    }
    catch (...)
    {
        return 0;
    }
}

MLAC_EXPORT int32_t mlac_trt_error_count(Build* build)
{
    return build->parser->getNbErrors();
}

MLAC_EXPORT int32_t mlac_trt_error(Build* build, int32_t index, MlacTrtParseError* out)
{
    nvonnxparser::IParserError const* error = build->parser->getError(index);
    if (error == nullptr)
    {
        return 0;
    }
    *out = {static_cast<int32_t>(error->code()), error->node(), error->desc(), error->nodeName(), error->nodeOperator()};
    return 1;
}

// kind 0: inputs, 1: outputs.
MLAC_EXPORT int32_t mlac_trt_tensor_count(Build* build, int32_t kind)
{
    return kind == 0 ? build->network->getNbInputs() : build->network->getNbOutputs();
}

MLAC_EXPORT int32_t mlac_trt_tensor(Build* build, int32_t kind, int32_t index, MlacTrtTensor* out)
{
    trt::ITensor* tensor = kind == 0 ? build->network->getInput(index) : build->network->getOutput(index);
    if (tensor == nullptr)
    {
        return 0;
    }
    trt::Dims const shape = tensor->getDimensions();
    *out = {};
    out->name = tensor->getName();
    out->dtype = static_cast<int32_t>(tensor->getType());
    out->rank = shape.nbDims;
    for (int32_t i = 0; i < shape.nbDims && i < 8; ++i)
    {
        out->dims[i] = shape.d[i];
        out->symbols[i] = kind == 0 ? tensor->getDimensionName(i) : nullptr;
    }
    return 1;
}

MLAC_EXPORT int32_t mlac_trt_layer_count(Build* build)
{
    return build->network->getNbLayers();
}

// For an attention input layer: 1 when its attention may be split into primitives, 0 when it must
// be one fused kernel (the build fails when it cannot be), -1 for any other layer.
MLAC_EXPORT int32_t mlac_trt_attention_decomposable(Build* build, int32_t index)
{
    trt::ILayer* layer = build->network->getLayer(index);
    if (layer == nullptr || layer->getType() != trt::LayerType::kATTENTION_INPUT)
    {
        return -1;
    }
    trt::IAttention* attention = static_cast<trt::IAttentionBoundaryLayer*>(layer)->getAttention();
    return attention == nullptr ? -1 : (attention->getDecomposable() ? 1 : 0);
}

// 1 when all of an ONNX model in memory was understood; external data is read from beside `path`.
MLAC_EXPORT int32_t mlac_trt_parse_bytes(Build* build, void const* bytes, uint64_t size, char const* path)
{
    try
    {
        return build->parser->parse(bytes, size, path) ? 1 : 0;
    }
    catch (...)
    {
        return 0;
    }
}

// 1 when the registry took the plugin library. TensorRT for RTX takes none.
MLAC_EXPORT int32_t mlac_trt_load_plugins(void* getRegistry, char const* path)
{
#ifdef TRT_MAJOR_ENTERPRISE
    trt::IPluginRegistry* registry = reinterpret_cast<GetRegistry>(getRegistry)();
    return registry != nullptr && registry->loadLibrary(path) != nullptr ? 1 : 0;
#else
    static_cast<void>(getRegistry);
    static_cast<void>(path);
    return 0;
#endif
}

// A build configuration for the given compute capabilities (89 for sm89), without profiles. Enterprise
// TensorRT takes none: it builds for the GPU it runs on.
MLAC_EXPORT Config* mlac_trt_config(Build* build, int32_t const* targets, int32_t count, int32_t threads)
{
    try
    {
        auto result = std::make_unique<Config>();
        result->config.reset(build->builder->createBuilderConfig());
        if (!result->config)
        {
            return nullptr;
        }
#ifdef TRT_MAJOR_ENTERPRISE
        static_cast<void>(targets);
        if (count != 0)
        {
            return nullptr;
        }
        // LatentAttention writes its cache in place.
        result->config->setPreviewFeature(trt::PreviewFeature::kALIASED_PLUGIN_IO_10_03, true);
#else
        if (!result->config->setNbComputeCapabilities(count))
        {
            return nullptr;
        }
        for (int32_t i = 0; i < count; ++i)
        {
            if (!result->config->setComputeCapability(static_cast<trt::ComputeCapability>(targets[i]), i))
            {
                return nullptr;
            }
        }
#endif
        if (!build->builder->setMaxThreads(threads))
        {
            return nullptr;
        }
        result->config->setProfilingVerbosity(trt::ProfilingVerbosity::kDETAILED);
        return result.release();
    }
    catch (...)
    {
        return nullptr;
    }
}

MLAC_EXPORT void mlac_trt_config_free(Config* config)
{
    delete config;
}

// Gives the configuration a timing cache, from bytes or empty; 0 when TensorRT refuses the bytes. TensorRT
// for RTX keeps none.
MLAC_EXPORT int32_t mlac_trt_timing_set(Config* config, void const* bytes, uint64_t size)
{
#ifdef TRT_MAJOR_ENTERPRISE
    try
    {
        config->timing.reset(config->config->createTimingCache(bytes, size));
        return config->timing && config->config->setTimingCache(*config->timing, false) ? 1 : 0;
    }
    catch (...)
    {
        return 0;
    }
#else
    static_cast<void>(config);
    static_cast<void>(bytes);
    static_cast<void>(size);
    return 0;
#endif
}

// The timing cache as it is now, or null.
MLAC_EXPORT trt::IHostMemory* mlac_trt_timing_get(Config* config)
{
#ifdef TRT_MAJOR_ENTERPRISE
    return config->timing ? config->timing->serialize() : nullptr;
#else
    static_cast<void>(config);
    return nullptr;
#endif
}

// Begins the next profile; 0 when TensorRT refuses.
MLAC_EXPORT int32_t mlac_trt_profile_begin(Build* build, Config* config)
{
    config->profile = build->builder->createOptimizationProfile();
    return config->profile == nullptr ? 0 : 1;
}

// Sets one input's smallest, most usual and largest shape in the profile begun last.
MLAC_EXPORT int32_t mlac_trt_profile_shape(Config* config, char const* input, int32_t rank, int64_t const* smallest,
    int64_t const* usual, int64_t const* largest)
{
    if (config->profile == nullptr || rank < 0 || rank > trt::Dims::MAX_DIMS)
    {
        return 0;
    }
    using Selector = trt::OptProfileSelector;
    bool const ok = config->profile->setDimensions(input, Selector::kMIN, dims(smallest, rank))
        && config->profile->setDimensions(input, Selector::kOPT, dims(usual, rank))
        && config->profile->setDimensions(input, Selector::kMAX, dims(largest, rank));
    return ok ? 1 : 0;
}

// 1 when the profile begun last is complete and was taken.
MLAC_EXPORT int32_t mlac_trt_profile_finish(Config* config)
{
    trt::IOptimizationProfile* profile = config->profile;
    config->profile = nullptr;
    return profile != nullptr && profile->isValid() && config->config->addOptimizationProfile(profile) >= 0 ? 1 : 0;
}

// The serialized engine, or null; the log says why.
MLAC_EXPORT trt::IHostMemory* mlac_trt_build(Build* build, Config* config)
{
    try
    {
        return build->builder->buildSerializedNetwork(*build->network, *config->config);
    }
    catch (...)
    {
        return nullptr;
    }
}

MLAC_EXPORT void const* mlac_trt_bytes(trt::IHostMemory* memory, uint64_t* size)
{
    *size = memory->size();
    return memory->data();
}

MLAC_EXPORT void mlac_trt_bytes_free(trt::IHostMemory* memory)
{
    delete memory;
}
