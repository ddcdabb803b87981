#include "bundle.h"

#include <cstring>

#include "report.h"

namespace mlac
{
namespace
{
constexpr char kMagic[] = "mlac.trt";
constexpr uint32_t kVersion = 1;
constexpr size_t kHeader = 32;
constexpr size_t kMaxKernels = 64;

[[noreturn]] void damaged(std::string const& expected, std::string const& found)
{
    throw refusal("field `kernels`", expected, found, "build the engine again with `mlac build`: the bytes are damaged or cut short");
}

template <typename Integer>
Integer little(uint8_t const* at)
{
    Integer value = 0;
    for (size_t i = 0; i < sizeof value; ++i)
    {
        value |= static_cast<Integer>(at[i]) << (8 * i);
    }
    return value;
}

uint64_t fnv(uint8_t const* at, size_t bytes)
{
    uint64_t hash = 0xcbf29ce484222325ull;
    for (size_t i = 0; i < bytes; ++i)
    {
        hash = (hash ^ at[i]) * 0x100000001b3ull;
    }
    return hash;
}

// A cubin is a 64-bit ELF file of machine 190 whose flags hold the architecture: in bits 8 to 15 since CUDA 13, before in 0 to 7.
void checkCubin(Kernel const& kernel)
{
    if (kernel.cubinBytes < 64 || std::memcmp(kernel.cubin, "\x7f" "ELF\x02\x01", 6) != 0 || little<uint16_t>(kernel.cubin + 18) != 190)
    {
        damaged(text("a cubin for ", kernel.name), text(kernel.cubinBytes, " bytes that are no ELF file of CUDA"));
    }
    uint32_t const flags = little<uint32_t>(kernel.cubin + 48);
    uint32_t const wanted = static_cast<uint32_t>(kernel.major * 10 + kernel.minor);
    uint32_t const newer = flags >> 8 & 0xff;
    if (newer != wanted && (flags & 0xff) != wanted)
    {
        throw refusal(text("cubin of ", kernel.name), text("architecture sm_", wanted), text("sm_", newer != 0 ? newer : flags & 0xff),
            "build the engine again with `mlac build`: recipe and cubin are of two builds");
    }
}
} // namespace

std::shared_ptr<Bundle const> Bundle::read(void const* data, size_t bytes)
{
    auto bundle = std::make_shared<Bundle>();
    auto const* begin = static_cast<uint8_t const*>(data);
    if (begin == nullptr || bytes < kHeader || std::memcmp(begin, kMagic, 8) != 0)
    {
        damaged("kernels that `mlac build` bundled", text(begin == nullptr ? 0 : bytes, " bytes of something else"));
    }
    if (little<uint32_t>(begin + 8) != kVersion)
    {
        throw refusal("field `kernels`", text("form ", kVersion), text("form ", little<uint32_t>(begin + 8)),
            "use the plugin library of the mlac that built the engine");
    }
    uint32_t const count = little<uint32_t>(begin + 12);
    uint64_t const total = little<uint64_t>(begin + 16);
    // A string attribute of ONNX comes with the zero that ends it.
    if (total != bytes && !(bytes > 0 && total == bytes - 1 && begin[bytes - 1] == 0))
    {
        damaged(text(total, " bytes"), text(bytes, " bytes"));
    }
    bundle->mBytes.assign(begin, begin + total);
    uint8_t const* const whole = bundle->mBytes.data();
    bundle->mChecksum = fnv(whole + kHeader, total - kHeader);
    if (bundle->mChecksum != little<uint64_t>(whole + 24))
    {
        damaged("bytes with the checksum in their header", "other bytes");
    }
    if (count == 0 || count > kMaxKernels)
    {
        damaged(text("1 to ", kMaxKernels, " kernels"), text(count));
    }
    size_t at = kHeader;
    for (uint32_t i = 0; i < count; ++i)
    {
        if (total - at < 16)
        {
            damaged(text(count, " kernels"), text(i));
        }
        uint64_t const textBytes = little<uint64_t>(whole + at), cubinBytes = little<uint64_t>(whole + at + 8);
        at += 16;
        if (textBytes > total - at || cubinBytes > total - at - textBytes)
        {
            damaged("a recipe and a cubin", text("lengths of ", textBytes, " and ", cubinBytes, " where ", total - at, " bytes are left"));
        }
        Kernel kernel = readRecipe(std::string(reinterpret_cast<char const*>(whole + at), textBytes));
        kernel.cubin = whole + at + textBytes;
        kernel.cubinBytes = cubinBytes;
        checkCubin(kernel);
        bundle->mKernels.push_back(std::move(kernel));
        at += textBytes + cubinBytes;
    }
    if (at != total)
    {
        damaged("nothing behind the last kernel", text(total - at, " bytes"));
    }
    Kernel const& first = bundle->mKernels.front();
    for (size_t i = 1; i < bundle->mKernels.size(); ++i)
    {
        Kernel const& other = bundle->mKernels[i];
        for (size_t j = 0; j < i; ++j)
        {
            if (bundle->mKernels[j].queryTokens == other.queryTokens)
            {
                damaged("one kernel for each number of query tokens", text("two for ", other.queryTokens));
            }
        }
        bool const same = first.major == other.major && first.minor == other.minor && first.f16 == other.f16 && first.heads == other.heads
            && first.rank == other.rank && first.rope == other.rope && first.window == other.window && first.page == other.page
            && first.tree == other.tree && first.sinks == other.sinks;
        if (!same)
        {
            damaged(text("kernels of one layer, as ", first.name), other.name);
        }
    }
    return bundle;
}

Kernel const& Bundle::forTokens(int64_t queryTokens) const
{
    std::string there;
    for (Kernel const& kernel : mKernels)
    {
        if (kernel.queryTokens == queryTokens)
        {
            return kernel;
        }
        there += text(there.empty() ? "" : ", ", kernel.queryTokens);
    }
    throw refusal("query tokens", text(there, ", which the engine has kernels for"), text(queryTokens),
        "run pieces of that many tokens, or build the engine for this number");
}
} // namespace mlac
