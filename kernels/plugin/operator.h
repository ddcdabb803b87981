// The operator's contract (docs/latent-attention.md) on the side of TensorRT: attributes, and the shapes and types of a call.
#pragma once

#include <NvInferRuntime.h>

#include <vector>

#include "bundle.h"
#include "step.h"

namespace mlac
{
namespace trt = nvinfer1;

constexpr char const* kName = "LatentAttention";
constexpr char const* kPluginVersion = "1";
constexpr char const* kNamespace = "mlac";

// Bits of the attribute `optional_inputs`.
constexpr int64_t kWithPageTable = 1, kWithSinks = 2, kWithTreeMask = 4, kWithKeyMask = 8;

struct Attributes
{
    int32_t rank;
    float scale;
    int32_t window;
    int32_t optionalInputs;
    int32_t withLse;

    bool has(int64_t input) const
    {
        return (optionalInputs & input) != 0;
    }
    int32_t inputs() const;
    int32_t outputs() const
    {
        return withLse != 0 ? 3 : 2;
    }
    // The tensors in the order of TensorRT's inputs and outputs.
    std::vector<Tensor> order() const;

    // Throws when a number is out of range or the kernels compute something else.
    void check(Bundle const& bundle) const;
};

// The numbers of a call that its shapes give.
struct Shape
{
    int64_t batch, queryTokens, pageStride, cachePages, cacheBytes;

    // Checks ranks and sizes of all inputs. Throws with the input's name.
    static Shape of(Attributes const& attributes, Bundle const& bundle, std::vector<trt::Dims> const& inputs);

    // Workspace of one step: the kernel's regions, then the LSE when nobody wants it.
    uint64_t workspace(Attributes const& attributes, Kernel const& kernel) const;
    // Where the LSE is in it.
    uint64_t lse(Kernel const& kernel) const;
};

// The type that a tensor must have.
trt::DataType typeOf(Tensor tensor, Bundle const& bundle);
// Index 1 of the outputs is the cache of index 2 of the inputs.
constexpr int32_t kCacheInput = 2, kCacheOutput = 1;
} // namespace mlac
