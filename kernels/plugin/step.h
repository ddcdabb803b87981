// One step: a kernel's recipe followed with the tensors of a call.
#pragma once

#include <memory>

#include "bundle.h"
#include "driver.h"

namespace mlac
{
// What a call brings; absent tensors are 0.
struct Call
{
    DeviceAddress tensors[kTensors];
    DeviceAddress workspace;
    int64_t batch, pageStride, cachePages;
    float scale;
};

// Bytes of the workspace for so many requests and columns of the page table; what the recipe's regions take.
uint64_t workspaceBytes(Kernel const& kernel, int64_t batch, int64_t pageStride);

// A kernel loaded into the CUDA context that was current then.
class Loaded
{
public:
    // Throws without a driver or context, on a GPU of another architecture, and when the driver does not take the cubin.
    explicit Loaded(Kernel const& kernel);
    ~Loaded();
    Loaded(Loaded const&) = delete;
    Loaded& operator=(Loaded const&) = delete;

    // Launches everything on the stream, in the recipe's order.
    void run(Kernel const& kernel, Call const& call, Stream stream) const;

    Context context() const
    {
        return mContext;
    }

private:
    Driver const& mDriver;
    Context mContext{};
    Module mModule{};
    std::vector<Function> mFunctions; // as the recipe's launches
};

// The context that is current on this thread; throws when none is.
Context currentContext(Driver const& driver);
} // namespace mlac
