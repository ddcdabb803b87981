// The bytes that travel in an engine: recipes (kernels/src/launch/recipe.rs documents their lines) with their cubins
// (kernels/src/bundle.rs documents the frame around them). Everything is checked when it is read.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace mlac
{
// The tensors that a recipe names; regions of the workspace follow them.
enum Tensor : uint32_t
{
    kQuery,
    kNewRows,
    kCache,
    kPastLengths,
    kPageTable,
    kSinks,
    kTreeMask,
    kSums,
    kLse,
    kTensors
};

// As docs/latent-attention.md and recipes have it.
char const* nameOf(Tensor tensor);

enum class Number
{
    kBatch,
    kPageStride,
    kCachePages,
    kScale
};

struct Field
{
    enum Kind
    {
        kPointer,
        kNumber,
        kConstant
    };
    Kind kind;
    uint32_t offset;
    uint32_t address; // of a pointer: a Tensor, or kTensors + the region's index
    Number number;
    int32_t constant;
};

struct Map
{
    uint32_t address;
    int dataType, interleave, swizzle, promotion, fill;
    uint32_t box[3];
    uint64_t extent[2];
    uint64_t perRequest, perPage;
};

// A block of parameters, or a tensor map.
struct Argument
{
    bool isMap;
    uint32_t bytes;
    std::vector<Field> fields;
    Map map;
};

struct Launch
{
    std::string function;
    uint32_t threads, sharedBytes;
    bool dependent;
    uint64_t fixed, perRequest, divisor;
    std::vector<Argument> arguments;
};

struct Region
{
    std::string name;
    uint64_t fixed, perRequest, perEntry;
};

struct Kernel
{
    std::string name;
    int major, minor;
    bool f16;
    int64_t heads, queryTokens, rank, rope, window, page;
    bool tree, sinks;
    std::vector<Region> regions;
    std::vector<Launch> launches;
    uint8_t const* cubin;
    size_t cubinBytes;

    int64_t row() const
    {
        return rank + rope;
    }
};

class Bundle
{
public:
    // Copies and reads the bytes; one zero byte behind them is taken for the end of a string. Throws `Refused`.
    static std::shared_ptr<Bundle const> read(void const* data, size_t bytes);

    std::vector<Kernel> const& kernels() const
    {
        return mKernels;
    }
    std::vector<uint8_t> const& bytes() const
    {
        return mBytes;
    }
    uint64_t checksum() const
    {
        return mChecksum;
    }
    // Throws with the numbers of query tokens that there are kernels for.
    Kernel const& forTokens(int64_t queryTokens) const;

private:
    std::vector<uint8_t> mBytes;
    std::vector<Kernel> mKernels;
    uint64_t mChecksum{};
};

// Reads one recipe. Throws `Refused` with the line that is wrong.
Kernel readRecipe(std::string const& text);
} // namespace mlac
