#include "driver.h"

#include <dlfcn.h>

#include <mutex>

#include "report.h"

namespace mlac
{
namespace
{
constexpr char const* kLibrary = "libcuda.so.1";
constexpr char const* kNeeded = "libcuda.so.1 of an NVIDIA driver for CUDA 13.0 (580 or later)";
constexpr char const* kFix = "install the NVIDIA driver; in a container, start it with GPU access";

template <typename Pointer>
void find(void* library, char const* name, Pointer& place)
{
    void* address = dlsym(library, name);
    if (address == nullptr)
    {
        throw refusal("CUDA driver", kNeeded, text("a library without ", name), kFix, trt::ErrorCode::kFAILED_INITIALIZATION);
    }
    place = reinterpret_cast<Pointer>(address);
}

Driver open()
{
    void* library = dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr)
    {
        char const* reason = dlerror();
        throw refusal("CUDA driver", kNeeded, reason == nullptr ? "none" : reason, kFix, trt::ErrorCode::kFAILED_INITIALIZATION);
    }
    // Never closed: the driver's threads outlive every object of ours.
    Driver driver{};
    find(library, "cuInit", driver.init);
    find(library, "cuGetErrorName", driver.errorName);
    find(library, "cuGetErrorString", driver.errorString);
    find(library, "cuCtxGetCurrent", driver.currentContext);
    find(library, "cuCtxGetDevice", driver.currentDevice);
    find(library, "cuDeviceGetAttribute", driver.deviceAttribute);
    find(library, "cuModuleLoadData", driver.moduleLoadData);
    find(library, "cuModuleUnload", driver.moduleUnload);
    find(library, "cuModuleGetFunction", driver.moduleFunction);
    find(library, "cuFuncSetAttribute", driver.functionAttribute);
    find(library, "cuMemcpyDtoDAsync_v2", driver.copyAsync);
    find(library, "cuLaunchKernelEx", driver.launch);
    find(library, "cuTensorMapEncodeTiled", driver.encodeTiled);
    driver.check(driver.init(0), "start");
    return driver;
}
} // namespace

Driver const& Driver::get()
{
    static Driver driver{};
    static bool opened = false;
    static std::mutex mutex;
    std::lock_guard<std::mutex> lock(mutex);
    if (!opened)
    {
        driver = open();
        opened = true;
    }
    return driver;
}

void Driver::check(int status, char const* action) const
{
    if (status == 0)
    {
        return;
    }
    char const* name = nullptr;
    char const* words = nullptr;
    errorName(status, &name);
    errorString(status, &words);
    throw Refused(trt::ErrorCode::kFAILED_EXECUTION,
        text("CUDA driver: cannot ", action, ": ", name == nullptr ? "error" : name, " (", status, "), ",
            words == nullptr ? "no description" : words));
}
} // namespace mlac
