// `mlac::LatentAttention` as TensorRT knows it: a plugin with the three capabilities, and its creator.
#pragma once

#include <NvInferRuntime.h>

#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "operator.h"

namespace mlac
{
class LatentAttention final : public trt::IPluginV3,
                              public trt::IPluginV3OneCore,
                              public trt::IPluginV3OneBuildV2,
                              public trt::IPluginV3OneRuntime
{
public:
    // Throws when attributes and kernels contradict each other.
    LatentAttention(Attributes const& attributes, std::shared_ptr<Bundle const> bundle);

    // IPluginV3
    trt::IPluginCapability* getCapabilityInterface(trt::PluginCapabilityType type) noexcept override;
    trt::IPluginV3* clone() noexcept override;

    // IPluginV3OneCore
    trt::AsciiChar const* getPluginName() const noexcept override;
    trt::AsciiChar const* getPluginVersion() const noexcept override;
    trt::AsciiChar const* getPluginNamespace() const noexcept override;

    // IPluginV3OneBuildV2
    int32_t configurePlugin(trt::DynamicPluginTensorDesc const* in, int32_t nbInputs, trt::DynamicPluginTensorDesc const* out,
        int32_t nbOutputs) noexcept override;
    int32_t getOutputDataTypes(
        trt::DataType* outputTypes, int32_t nbOutputs, trt::DataType const* inputTypes, int32_t nbInputs) const noexcept override;
    int32_t getOutputShapes(trt::DimsExprs const* inputs, int32_t nbInputs, trt::DimsExprs const* shapeInputs, int32_t nbShapeInputs,
        trt::DimsExprs* outputs, int32_t nbOutputs, trt::IExprBuilder& exprBuilder) noexcept override;
    bool supportsFormatCombination(
        int32_t pos, trt::DynamicPluginTensorDesc const* inOut, int32_t nbInputs, int32_t nbOutputs) noexcept override;
    int32_t getNbOutputs() const noexcept override;
    size_t getWorkspaceSize(trt::DynamicPluginTensorDesc const* inputs, int32_t nbInputs, trt::DynamicPluginTensorDesc const* outputs,
        int32_t nbOutputs) const noexcept override;
    char const* getTimingCacheID() noexcept override;
    char const* getMetadataString() noexcept override;
    int32_t getAliasedInput(int32_t outputIndex) noexcept override;

    // IPluginV3OneRuntime
    int32_t onShapeChange(trt::PluginTensorDesc const* in, int32_t nbInputs, trt::PluginTensorDesc const* out,
        int32_t nbOutputs) noexcept override;
    int32_t enqueue(trt::PluginTensorDesc const* inputDesc, trt::PluginTensorDesc const* outputDesc, void const* const* inputs,
        void* const* outputs, void* workspace, cudaStream_t stream) noexcept override;
    trt::IPluginV3* attachToContext(trt::IPluginResourceContext* context) noexcept override;
    trt::PluginFieldCollection const* getFieldsToSerialize() noexcept override;

private:
    // A copy: the same immutable parts, nothing loaded.
    LatentAttention(LatentAttention const& other);

    trt::IErrorRecorder* recorder() const noexcept;
    void checkCount(int32_t nbInputs, int32_t nbOutputs) const;
    // The shape of a call from descriptions of all inputs, with types checked.
    Shape shapeOf(trt::PluginTensorDesc const* in, trt::PluginTensorDesc const* out) const;
    Loaded const& loaded(Kernel const& kernel);

    Attributes mAttributes;
    std::shared_ptr<Bundle const> mBundle;
    std::vector<Tensor> mOrder;
    std::string mTimingCacheId, mMetadata;
    trt::IPluginResourceContext* mContext{nullptr};
    std::map<int64_t, std::unique_ptr<Loaded>> mLoaded; // by query tokens

    // What getFieldsToSerialize points to.
    int32_t mTensorRtMajor{NV_TENSORRT_MAJOR};
    std::vector<trt::PluginField> mFields;
    trt::PluginFieldCollection mCollection{};
};

class LatentAttentionCreator final : public trt::IPluginCreatorV3One
{
public:
    LatentAttentionCreator();
    trt::IPluginV3* createPlugin(
        trt::AsciiChar const* name, trt::PluginFieldCollection const* fields, trt::TensorRTPhase phase) noexcept override;
    trt::PluginFieldCollection const* getFieldNames() noexcept override;
    trt::AsciiChar const* getPluginName() const noexcept override;
    trt::AsciiChar const* getPluginVersion() const noexcept override;
    trt::AsciiChar const* getPluginNamespace() const noexcept override;

private:
    std::vector<trt::PluginField> mFields;
    trt::PluginFieldCollection mCollection{};
};
} // namespace mlac
