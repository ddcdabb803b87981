#include "step.h"

#include <cstring>
#include <deque>
#include <limits>

#include "report.h"

namespace mlac
{
namespace
{
constexpr uint64_t kAlignment = 256;

uint64_t regionBytes(Region const& region, int64_t batch, int64_t pageStride)
{
    auto const requests = static_cast<uint64_t>(batch), entries = requests * static_cast<uint64_t>(pageStride);
    return region.fixed + region.perRequest * requests + region.perEntry * entries;
}

uint64_t next(uint64_t end)
{
    return (end + kAlignment - 1) / kAlignment * kAlignment;
}

int32_t narrowed(int64_t value)
{
    if (value < 0 || value > std::numeric_limits<int32_t>::max())
    {
        throw refusal("launch", "a number of 31 bits", text(value), "divide the cache");
    }
    return static_cast<int32_t>(value);
}

// Fills the arguments of one launch; the bytes live as long as this does.
class Arguments
{
public:
    Arguments(Driver const& driver, Kernel const& kernel, Call const& call)
        : mDriver(driver)
        , mCall(call)
    {
        uint64_t at = 0;
        for (Region const& region : kernel.regions)
        {
            mRegions.push_back(call.workspace + at);
            mRegionNames.push_back(&region.name);
            at = next(at + regionBytes(region, call.batch, call.pageStride));
        }
    }

    std::vector<void*> of(Launch const& launch)
    {
        std::vector<void*> pointers;
        for (Argument const& argument : launch.arguments)
        {
            pointers.push_back(argument.isMap ? map(argument.map) : block(argument));
        }
        return pointers;
    }

private:
    DeviceAddress address(uint32_t which) const
    {
        if (which < kTensors)
        {
            return mCall.tensors[which];
        }
        // Whoever brings a page table needs no made one.
        if (*mRegionNames[which - kTensors] == "pages" && mCall.tensors[kPageTable] != 0)
        {
            return mCall.tensors[kPageTable];
        }
        return mRegions[which - kTensors];
    }

    int32_t number(Number which) const
    {
        switch (which)
        {
        case Number::kBatch: return narrowed(mCall.batch);
        case Number::kPageStride: return narrowed(mCall.pageStride);
        case Number::kCachePages: return narrowed(mCall.cachePages);
        case Number::kScale: break;
        }
        int32_t bits;
        std::memcpy(&bits, &mCall.scale, sizeof bits);
        return bits;
    }

    void* block(Argument const& argument)
    {
        mBlocks.emplace_back(argument.bytes / 8 + 1, 0);
        auto* bytes = reinterpret_cast<uint8_t*>(mBlocks.back().data());
        for (Field const& field : argument.fields)
        {
            if (field.kind == Field::kPointer)
            {
                DeviceAddress const value = address(field.address);
                std::memcpy(bytes + field.offset, &value, sizeof value);
            }
            else
            {
                int32_t const value = field.kind == Field::kNumber ? number(field.number) : field.constant;
                std::memcpy(bytes + field.offset, &value, sizeof value);
            }
        }
        return bytes;
    }

    void* map(Map const& map)
    {
        mMaps.emplace_back();
        uint64_t const last
            = map.perRequest * static_cast<uint64_t>(mCall.batch) + map.perPage * static_cast<uint64_t>(mCall.cachePages);
        uint64_t const extents[3] = {map.extent[0], map.extent[1], last};
        uint64_t const strides[2] = {map.extent[0] * 2, map.extent[0] * map.extent[1] * 2};
        uint32_t const steps[3] = {1, 1, 1};
        mDriver.check(mDriver.encodeTiled(&mMaps.back(), map.dataType, 3, reinterpret_cast<void*>(address(map.address)), extents,
                          strides, map.box, steps, map.interleave, map.swizzle, map.promotion, map.fill),
            "describe a tensor");
        return &mMaps.back();
    }

    Driver const& mDriver;
    Call const& mCall;
    std::vector<DeviceAddress> mRegions;
    std::vector<std::string const*> mRegionNames;
    std::deque<std::vector<uint64_t>> mBlocks; // of words, for their alignment
    std::deque<TensorMap> mMaps;
};
} // namespace

uint64_t workspaceBytes(Kernel const& kernel, int64_t batch, int64_t pageStride)
{
    uint64_t at = 0;
    for (Region const& region : kernel.regions)
    {
        at = next(at + regionBytes(region, batch, pageStride));
    }
    return at;
}

Context currentContext(Driver const& driver)
{
    Context context = nullptr;
    driver.check(driver.currentContext(&context), "ask for the current context");
    if (context == nullptr)
    {
        throw refusal("CUDA context", "one that is current on this thread", "none", "call TensorRT with its device set",
            trt::ErrorCode::kINVALID_STATE);
    }
    return context;
}

Loaded::Loaded(Kernel const& kernel)
    : mDriver(Driver::get())
    , mContext(currentContext(mDriver))
{
    int device = 0, major = 0, minor = 0;
    mDriver.check(mDriver.currentDevice(&device), "ask for the device");
    mDriver.check(mDriver.deviceAttribute(&major, kComputeCapabilityMajor, device), "read the compute capability");
    mDriver.check(mDriver.deviceAttribute(&minor, kComputeCapabilityMinor, device), "read the compute capability");
    if (major != kernel.major || minor != kernel.minor)
    {
        throw refusal(text("kernel ", kernel.name), text("a GPU of compute capability ", kernel.major, '.', kernel.minor),
            text("one of ", major, '.', minor), "build the engine for this GPU with `mlac build`", trt::ErrorCode::kUNSUPPORTED_STATE);
    }
    mDriver.check(mDriver.moduleLoadData(&mModule, kernel.cubin), "load the cubin");
    try
    {
        for (Launch const& launch : kernel.launches)
        {
            Function function = nullptr;
            mDriver.check(mDriver.moduleFunction(&function, mModule, launch.function.c_str()), "find a function of the cubin");
            if (launch.sharedBytes > 0)
            {
                mDriver.check(mDriver.functionAttribute(function, kMaxDynamicShared, static_cast<int>(launch.sharedBytes)),
                    "reserve shared memory");
            }
            mFunctions.push_back(function);
        }
    }
    catch (...)
    {
        mDriver.moduleUnload(mModule);
        throw;
    }
}

Loaded::~Loaded()
{
    // A status here has nowhere to go.
    mDriver.moduleUnload(mModule);
}

void Loaded::run(Kernel const& kernel, Call const& call, Stream stream) const
{
    Arguments arguments(mDriver, kernel, call);
    for (size_t i = 0; i < kernel.launches.size(); ++i)
    {
        Launch const& launch = kernel.launches[i];
        uint64_t const work = launch.fixed + launch.perRequest * static_cast<uint64_t>(call.batch);
        uint64_t const blocks = (work + launch.divisor - 1) / launch.divisor;
        std::vector<void*> pointers = arguments.of(launch);
        LaunchAttribute attribute{};
        attribute.id = kProgrammaticSerialization;
        attribute.value.allowed = 1;
        LaunchConfig config{};
        config.grid[0] = static_cast<uint32_t>(narrowed(static_cast<int64_t>(blocks)));
        config.grid[1] = config.grid[2] = 1;
        config.block[0] = launch.threads;
        config.block[1] = config.block[2] = 1;
        config.sharedBytes = launch.sharedBytes;
        config.stream = stream;
        config.attributes = &attribute;
        config.attributeCount = launch.dependent ? 1 : 0;
        mDriver.check(mDriver.launch(&config, mFunctions[i], pointers.data(), nullptr), text("launch ", launch.function).c_str());
    }
}
} // namespace mlac
