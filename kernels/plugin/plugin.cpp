#include "plugin.h"

#include <utility>

#include "report.h"

namespace mlac
{
namespace
{
constexpr int32_t kDone = 0, kFailed = 1;

std::vector<trt::Dims> dimsOf(trt::PluginTensorDesc const* descs, int32_t count)
{
    std::vector<trt::Dims> dims;
    for (int32_t i = 0; i < count; ++i)
    {
        dims.push_back(descs[i].dims);
    }
    return dims;
}

std::vector<trt::Dims> dimsOf(trt::DynamicPluginTensorDesc const* descs, int32_t count, trt::Dims trt::DynamicPluginTensorDesc::*which)
{
    std::vector<trt::Dims> dims;
    for (int32_t i = 0; i < count; ++i)
    {
        dims.push_back(descs[i].*which);
    }
    return dims;
}

[[noreturn]] void wrongCall(char const* expected, std::string const& found)
{
    throw refusal("call of mlac::LatentAttention", expected, found, "this is a mistake of the caller");
}

void checkPointer(void const* pointer, char const* name, uint64_t alignment)
{
    if (pointer == nullptr || reinterpret_cast<uint64_t>(pointer) % alignment != 0)
    {
        throw refusal(text("mlac::LatentAttention, `", name, "`"), text("a device address that is a multiple of ", alignment),
            text(pointer), "bind the start of an allocation");
    }
}
} // namespace

LatentAttention::LatentAttention(Attributes const& attributes, std::shared_ptr<Bundle const> bundle)
    : mAttributes(attributes)
    , mBundle(std::move(bundle))
    , mOrder(attributes.order())
{
    mAttributes.check(*mBundle);
    mTimingCacheId = text(std::hex, mBundle->checksum());
    mMetadata = text(mBundle->kernels().front().name, ", scale ", mAttributes.scale, ", optional_inputs ", mAttributes.optionalInputs,
        ", with_lse ", mAttributes.withLse);
}

LatentAttention::LatentAttention(LatentAttention const& other)
    : trt::IPluginV3(other)
    , trt::IPluginV3OneCore(other)
    , trt::IPluginV3OneBuildV2(other)
    , trt::IPluginV3OneRuntime(other)
    , mAttributes(other.mAttributes)
    , mBundle(other.mBundle)
    , mOrder(other.mOrder)
    , mTimingCacheId(other.mTimingCacheId)
    , mMetadata(other.mMetadata)
    , mContext(other.mContext)
{
}

trt::IPluginCapability* LatentAttention::getCapabilityInterface(trt::PluginCapabilityType type) noexcept
{
    switch (type)
    {
    case trt::PluginCapabilityType::kCORE: return static_cast<trt::IPluginV3OneCore*>(this);
    case trt::PluginCapabilityType::kBUILD: return static_cast<trt::IPluginV3OneBuild*>(this);
    case trt::PluginCapabilityType::kRUNTIME: return static_cast<trt::IPluginV3OneRuntime*>(this);
    }
    return nullptr;
}

trt::IPluginV3* LatentAttention::clone() noexcept
{
    return guarded<trt::IPluginV3*>(recorder(), nullptr, [&] { return new LatentAttention(*this); });
}

trt::AsciiChar const* LatentAttention::getPluginName() const noexcept
{
    return kName;
}

trt::AsciiChar const* LatentAttention::getPluginVersion() const noexcept
{
    return kPluginVersion;
}

trt::AsciiChar const* LatentAttention::getPluginNamespace() const noexcept
{
    return kNamespace;
}

trt::IErrorRecorder* LatentAttention::recorder() const noexcept
{
    return mContext == nullptr ? nullptr : mContext->getErrorRecorder();
}

void LatentAttention::checkCount(int32_t nbInputs, int32_t nbOutputs) const
{
    if (nbInputs != mAttributes.inputs() || nbOutputs != mAttributes.outputs())
    {
        throw refusal("mlac::LatentAttention",
            text(mAttributes.inputs(), " inputs and ", mAttributes.outputs(), " outputs, as `optional_inputs` and `with_lse` say"),
            text(nbInputs, " and ", nbOutputs), "export the model again with `mlac export`");
    }
}

int32_t LatentAttention::configurePlugin(trt::DynamicPluginTensorDesc const* in, int32_t nbInputs,
    trt::DynamicPluginTensorDesc const* out, int32_t nbOutputs) noexcept
{
    return guarded(recorder(), kFailed, [&] {
        checkCount(nbInputs, nbOutputs);
        if (in == nullptr || out == nullptr)
        {
            wrongCall("descriptions", "none");
        }
        for (auto const which :
            {&trt::DynamicPluginTensorDesc::min, &trt::DynamicPluginTensorDesc::opt, &trt::DynamicPluginTensorDesc::max})
        {
            Shape::of(mAttributes, *mBundle, dimsOf(in, nbInputs, which));
        }
        return kDone;
    });
}

int32_t LatentAttention::getOutputDataTypes(
    trt::DataType* outputTypes, int32_t nbOutputs, trt::DataType const* inputTypes, int32_t nbInputs) const noexcept
{
    return guarded(recorder(), kFailed, [&] {
        checkCount(nbInputs, nbOutputs);
        if (outputTypes == nullptr || inputTypes == nullptr)
        {
            wrongCall("arrays of types", "none");
        }
        for (int32_t i = 0; i < nbInputs; ++i)
        {
            if (inputTypes[i] != typeOf(mOrder[i], *mBundle))
            {
                throw refusal(text("mlac::LatentAttention, input `", nameOf(mOrder[i]), "`"),
                    text("data type ", static_cast<int32_t>(typeOf(mOrder[i], *mBundle)), " of nvinfer1::DataType, as the kernels ",
                        mBundle->kernels().front().name),
                    text(static_cast<int32_t>(inputTypes[i])), "export the model with the --dtype that the kernels are built for");
            }
        }
        for (int32_t i = 0; i < nbOutputs; ++i)
        {
            outputTypes[i] = typeOf(mOrder[nbInputs + i], *mBundle);
        }
        return kDone;
    });
}

int32_t LatentAttention::getOutputShapes(trt::DimsExprs const* inputs, int32_t nbInputs, trt::DimsExprs const* /*shapeInputs*/,
    int32_t nbShapeInputs, trt::DimsExprs* outputs, int32_t nbOutputs, trt::IExprBuilder& exprBuilder) noexcept
{
    return guarded(recorder(), kFailed, [&] {
        checkCount(nbInputs, nbOutputs);
        if (inputs == nullptr || outputs == nullptr || nbShapeInputs != 0)
        {
            wrongCall("shapes of the inputs, and no shape inputs", text(nbShapeInputs, " shape inputs"));
        }
        if (inputs[0].nbDims != 4 || inputs[kCacheInput].nbDims != 3)
        {
            throw refusal("mlac::LatentAttention", "a query of 4 axes and a cache of 3",
                text(inputs[0].nbDims, " and ", inputs[kCacheInput].nbDims), "export the model again with `mlac export`");
        }
        trt::DimsExprs sums = inputs[0];
        sums.d[3] = exprBuilder.constant(mAttributes.rank);
        outputs[0] = sums;
        outputs[kCacheOutput] = inputs[kCacheInput];
        if (nbOutputs == 3)
        {
            trt::DimsExprs lse = inputs[0];
            lse.nbDims = 3;
            outputs[2] = lse;
        }
        return kDone;
    });
}

bool LatentAttention::supportsFormatCombination(
    int32_t pos, trt::DynamicPluginTensorDesc const* inOut, int32_t nbInputs, int32_t nbOutputs) noexcept
{
    return guarded(recorder(), false, [&] {
        checkCount(nbInputs, nbOutputs);
        if (inOut == nullptr || pos < 0 || pos >= nbInputs + nbOutputs)
        {
            wrongCall("a position among inputs and outputs", text(pos));
        }
        trt::PluginTensorDesc const& desc = inOut[pos].desc;
        return desc.format == trt::TensorFormat::kLINEAR && desc.type == typeOf(mOrder[pos], *mBundle);
    });
}

int32_t LatentAttention::getNbOutputs() const noexcept
{
    return mAttributes.outputs();
}

size_t LatentAttention::getWorkspaceSize(trt::DynamicPluginTensorDesc const* inputs, int32_t nbInputs,
    trt::DynamicPluginTensorDesc const* /*outputs*/, int32_t nbOutputs) const noexcept
{
    return guarded(recorder(), size_t{0}, [&] {
        checkCount(nbInputs, nbOutputs);
        if (inputs == nullptr)
        {
            wrongCall("descriptions", "none");
        }
        Shape const shape = Shape::of(mAttributes, *mBundle, dimsOf(inputs, nbInputs, &trt::DynamicPluginTensorDesc::max));
        uint64_t most = 0;
        for (Kernel const& kernel : mBundle->kernels())
        {
            most = std::max(most, shape.workspace(mAttributes, kernel));
        }
        return static_cast<size_t>(most);
    });
}

char const* LatentAttention::getTimingCacheID() noexcept
{
    return mTimingCacheId.c_str();
}

char const* LatentAttention::getMetadataString() noexcept
{
    return mMetadata.c_str();
}

int32_t LatentAttention::getAliasedInput(int32_t outputIndex) noexcept
{
    return outputIndex == kCacheOutput ? kCacheInput : -1;
}

Shape LatentAttention::shapeOf(trt::PluginTensorDesc const* in, trt::PluginTensorDesc const* out) const
{
    if (in == nullptr || out == nullptr)
    {
        wrongCall("descriptions", "none");
    }
    int32_t const inputs = mAttributes.inputs();
    for (size_t i = 0; i < mOrder.size(); ++i)
    {
        trt::PluginTensorDesc const& desc = static_cast<int32_t>(i) < inputs ? in[i] : out[i - static_cast<size_t>(inputs)];
        if (desc.format != trt::TensorFormat::kLINEAR || desc.type != typeOf(mOrder[i], *mBundle))
        {
            throw refusal(text("mlac::LatentAttention, `", nameOf(mOrder[i]), "`"),
                text("linear, type ", static_cast<int32_t>(typeOf(mOrder[i], *mBundle))),
                text("format ", static_cast<int32_t>(desc.format), ", type ", static_cast<int32_t>(desc.type)),
                "build the engine again with `mlac build`");
        }
    }
    return Shape::of(mAttributes, *mBundle, dimsOf(in, inputs));
}

Loaded const& LatentAttention::loaded(Kernel const& kernel)
{
    std::unique_ptr<Loaded>& place = mLoaded[kernel.queryTokens];
    if (!place || place->context() != currentContext(Driver::get()))
    {
        place = std::make_unique<Loaded>(kernel);
    }
    return *place;
}

int32_t LatentAttention::onShapeChange(
    trt::PluginTensorDesc const* in, int32_t nbInputs, trt::PluginTensorDesc const* out, int32_t nbOutputs) noexcept
{
    return guarded(recorder(), kFailed, [&] {
        checkCount(nbInputs, nbOutputs);
        // The kernel is loaded here, so that the first launch does not wait for it.
        loaded(mBundle->forTokens(shapeOf(in, out).queryTokens));
        return kDone;
    });
}

int32_t LatentAttention::enqueue(trt::PluginTensorDesc const* inputDesc, trt::PluginTensorDesc const* outputDesc,
    void const* const* inputs, void* const* outputs, void* workspace, cudaStream_t stream) noexcept
{
    return guarded(recorder(), kFailed, [&] {
        Shape const shape = shapeOf(inputDesc, outputDesc);
        Kernel const& kernel = mBundle->forTokens(shape.queryTokens);
        if (inputs == nullptr || outputs == nullptr)
        {
            wrongCall("arrays of addresses", "none");
        }
        Call call{};
        size_t const count = static_cast<size_t>(mAttributes.inputs());
        for (size_t i = 0; i < mOrder.size(); ++i)
        {
            void const* const pointer = i < count ? inputs[i] : outputs[i - count];
            trt::DataType const type = typeOf(mOrder[i], *mBundle);
            bool const half = type == trt::DataType::kHALF || type == trt::DataType::kBF16;
            checkPointer(pointer, nameOf(mOrder[i]), half ? 16 : type == trt::DataType::kINT64 ? 8 : 4);
            // The cache comes twice; the output, which comes later, is the one that is written and read.
            call.tensors[mOrder[i]] = reinterpret_cast<DeviceAddress>(pointer);
        }
        checkPointer(workspace, "workspace", 256);
        call.workspace = reinterpret_cast<DeviceAddress>(workspace);
        call.batch = shape.batch;
        call.pageStride = shape.pageStride;
        call.cachePages = shape.cachePages;
        call.scale = mAttributes.scale;
        if (call.tensors[kLse] == 0)
        {
            call.tensors[kLse] = call.workspace + shape.lse(kernel);
        }
        Loaded const& loaded = this->loaded(kernel);
        if (inputs[kCacheInput] != outputs[kCacheOutput])
        {
            Driver const& driver = Driver::get();
            driver.check(driver.copyAsync(reinterpret_cast<DeviceAddress>(outputs[kCacheOutput]),
                             reinterpret_cast<DeviceAddress>(inputs[kCacheInput]), static_cast<size_t>(shape.cacheBytes), stream),
                "copy the cache");
        }
        loaded.run(kernel, call, stream);
        return kDone;
    });
}

trt::IPluginV3* LatentAttention::attachToContext(trt::IPluginResourceContext* context) noexcept
{
    trt::IErrorRecorder* const recorder = context == nullptr ? nullptr : context->getErrorRecorder();
    return guarded<trt::IPluginV3*>(recorder, nullptr, [&] {
        auto attached = std::unique_ptr<LatentAttention>(new LatentAttention(*this));
        attached->mContext = context;
        return attached.release();
    });
}

trt::PluginFieldCollection const* LatentAttention::getFieldsToSerialize() noexcept
{
    return guarded<trt::PluginFieldCollection const*>(recorder(), nullptr, [&] {
        using Type = trt::PluginFieldType;
        std::vector<uint8_t> const& kernels = mBundle->bytes();
        mFields = {
            {"kv_lora_rank", &mAttributes.rank, Type::kINT32, 1},
            {"scale", &mAttributes.scale, Type::kFLOAT32, 1},
            {"sliding_window", &mAttributes.window, Type::kINT32, 1},
            {"optional_inputs", &mAttributes.optionalInputs, Type::kINT32, 1},
            {"with_lse", &mAttributes.withLse, Type::kINT32, 1},
            {"tensorrt_major", &mTensorRtMajor, Type::kINT32, 1},
            {"kernels", kernels.data(), Type::kUNKNOWN, static_cast<int32_t>(kernels.size())},
        };
        mCollection = {static_cast<int32_t>(mFields.size()), mFields.data()};
        return &mCollection;
    });
}
} // namespace mlac
