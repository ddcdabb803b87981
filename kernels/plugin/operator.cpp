#include "operator.h"

#include <cmath>

#include "report.h"

namespace mlac
{
namespace
{
constexpr int64_t kMaxBatch = 65535;

std::string shown(trt::Dims const& dims)
{
    std::string out = "[";
    for (int32_t i = 0; i < dims.nbDims && i < trt::Dims::MAX_DIMS; ++i)
    {
        out += text(i == 0 ? "" : ", ", dims.d[i]);
    }
    return out + "]";
}

// -1 in `expected` is any size of at least 1.
void checkDims(char const* name, std::vector<int64_t> const& expected, char const* letters, trt::Dims const& found)
{
    bool good = found.nbDims == static_cast<int32_t>(expected.size());
    for (size_t i = 0; good && i < expected.size(); ++i)
    {
        good = expected[i] == -1 ? found.d[i] >= 1 : found.d[i] == expected[i];
    }
    if (!good)
    {
        std::string sizes;
        for (int64_t const size : expected)
        {
            sizes += (sizes.empty() ? "" : ", ") + (size == -1 ? std::string("any") : text(size));
        }
        throw refusal(text("mlac::LatentAttention, input `", name, "`"), text(letters, " = [", sizes, "]"), shown(found),
            "export the model again with `mlac export`, or correct the profile");
    }
}

[[noreturn]] void wrongAttribute(char const* name, std::string const& expected, std::string const& found)
{
    throw refusal(text("mlac::LatentAttention, attribute `", name, "`"), expected, found, "export the model again with `mlac export`");
}
} // namespace

int32_t Attributes::inputs() const
{
    return 4 + has(kWithPageTable) + has(kWithSinks) + has(kWithTreeMask);
}

std::vector<Tensor> Attributes::order() const
{
    std::vector<Tensor> order = {kQuery, kNewRows, kCache, kPastLengths};
    if (has(kWithPageTable))
    {
        order.push_back(kPageTable);
    }
    if (has(kWithSinks))
    {
        order.push_back(kSinks);
    }
    if (has(kWithTreeMask))
    {
        order.push_back(kTreeMask);
    }
    order.push_back(kSums);
    order.push_back(kCache);
    if (withLse != 0)
    {
        order.push_back(kLse);
    }
    return order;
}

void Attributes::check(Bundle const& bundle) const
{
    if (!(scale > 0.0f) || !std::isfinite(scale))
    {
        wrongAttribute("scale", "a positive number", text(scale));
    }
    if (withLse != 0 && withLse != 1)
    {
        wrongAttribute("with_lse", "0 or 1", text(withLse));
    }
    if ((optionalInputs & kWithKeyMask) != 0)
    {
        wrongAttribute("optional_inputs", "no key_mask (8): TensorRT's kernels have none", text(optionalInputs));
    }
    if (optionalInputs < 0 || optionalInputs > (kWithPageTable | kWithSinks | kWithTreeMask))
    {
        wrongAttribute("optional_inputs", "a sum of 1 (page_table), 2 (sinks) and 4 (tree_mask)", text(optionalInputs));
    }
    Kernel const& kernel = bundle.kernels().front();
    auto const agree = [&](char const* name, int64_t attribute, int64_t compiled) {
        if (attribute != compiled)
        {
            throw refusal(text("mlac::LatentAttention, attribute `", name, "`"), text(compiled, ", which ", kernel.name, " was compiled for"),
                text(attribute), "build the engine again with `mlac build`: kernels and graph are of two models");
        }
    };
    agree("kv_lora_rank", rank, kernel.rank);
    agree("sliding_window", window, kernel.window);
    agree("optional_inputs, sinks", has(kWithSinks), kernel.sinks);
    agree("optional_inputs, tree_mask", has(kWithTreeMask), kernel.tree);
}

Shape Shape::of(Attributes const& attributes, Bundle const& bundle, std::vector<trt::Dims> const& inputs)
{
    if (static_cast<int32_t>(inputs.size()) != attributes.inputs())
    {
        throw refusal("mlac::LatentAttention", text(attributes.inputs(), " inputs, as `optional_inputs` says"), text(inputs.size()),
            "export the model again with `mlac export`");
    }
    Kernel const& first = bundle.kernels().front();
    int64_t const row = first.row();
    checkDims("query", {-1, -1, first.heads, row}, "[batch, query_tokens, heads, w]", inputs[0]);
    Shape shape{};
    shape.batch = inputs[0].d[0];
    shape.queryTokens = inputs[0].d[1];
    bundle.forTokens(shape.queryTokens);
    if (shape.batch > kMaxBatch)
    {
        throw refusal("mlac::LatentAttention", text("at most ", kMaxBatch, " sequences"), text(shape.batch), "run them in several batches");
    }
    checkDims("new_rows", {shape.batch, shape.queryTokens, row}, "[batch, query_tokens, w]", inputs[1]);
    checkDims("past_lengths", {shape.batch}, "[batch]", inputs[3]);
    size_t next = 4;
    if (attributes.has(kWithPageTable))
    {
        checkDims("cache", {-1, first.page, row}, "[num_pages, page_size, w]", inputs[2]);
        checkDims("page_table", {shape.batch, -1}, "[batch, max_pages]", inputs[next]);
        shape.cachePages = inputs[2].d[0];
        shape.pageStride = inputs[next].d[1];
        ++next;
    }
    else
    {
        checkDims("cache", {shape.batch, -1, row}, "[batch, capacity, w]", inputs[2]);
        int64_t const capacity = inputs[2].d[1];
        if (capacity % first.page != 0)
        {
            throw refusal("mlac::LatentAttention, input `cache`", text("a capacity that is a multiple of ", first.page), text(capacity),
                text("allocate ", (capacity / first.page + 1) * first.page, " rows"));
        }
        shape.pageStride = capacity / first.page;
    }
    // Positions and pages are 31-bit numbers in the kernels.
    constexpr int64_t kMost = 0x7fffffff;
    if (shape.pageStride > kMost / first.page || shape.cachePages > kMost
        || (shape.cachePages == 0 && shape.pageStride * shape.batch > kMost))
    {
        throw refusal("mlac::LatentAttention, input `cache`", text("at most ", kMost, " positions and pages"), shown(inputs[2]),
            "divide the cache");
    }
    if (shape.cachePages == 0)
    {
        shape.cachePages = shape.pageStride * shape.batch;
    }
    shape.cacheBytes = shape.cachePages * first.page * row * 2;
    if (attributes.has(kWithSinks))
    {
        checkDims("sinks", {first.heads}, "[heads]", inputs[next++]);
    }
    if (attributes.has(kWithTreeMask))
    {
        checkDims("tree_mask", {shape.batch, shape.queryTokens}, "[batch, query_tokens]", inputs[next++]);
    }
    return shape;
}

uint64_t Shape::lse(Kernel const& kernel) const
{
    return workspaceBytes(kernel, batch, pageStride);
}

uint64_t Shape::workspace(Attributes const& attributes, Kernel const& kernel) const
{
    uint64_t const rows = attributes.withLse != 0 ? 0 : static_cast<uint64_t>(batch * kernel.queryTokens * kernel.heads);
    return lse(kernel) + 4 * rows;
}

trt::DataType typeOf(Tensor tensor, Bundle const& bundle)
{
    switch (tensor)
    {
    case kPastLengths:
    case kPageTable: return trt::DataType::kINT32;
    case kSinks:
    case kLse: return trt::DataType::kFLOAT;
    case kTreeMask: return trt::DataType::kINT64;
    default: return bundle.kernels().front().f16 ? trt::DataType::kHALF : trt::DataType::kBF16;
    }
}
} // namespace mlac
