// A libcuda.so.1 for graphs with several kernels: each kernel has a driver of its own (kernels/tests/plugin/fake_cuda.cpp, which knows one
// request), and here a cubin is told by its bytes to belong to one of them.
//
// MLAC_FAKE_KERNELS  file with a line for each: path of the cubin, path of its driver
#include <dlfcn.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

using u64 = std::uint64_t;

namespace {
struct Driver {
  std::string cubin;
  void* library;
  template <typename F>
  F* get(const char* name) const {
    return reinterpret_cast<F*>(dlsym(library, name));
  }
};
struct Module {
  const Driver* driver;
  void* inner;
};
struct Function {
  const Driver* driver;
  void* inner;
};

const std::vector<Driver>& drivers() {
  static const std::vector<Driver> all = [] {
    std::vector<Driver> found;
    const char* list = std::getenv("MLAC_FAKE_KERNELS");
    std::ifstream lines(list == nullptr ? "" : list);
    std::string cubin, library;
    while (lines >> cubin >> library) {
      std::ifstream file(cubin, std::ios::binary);
      void* opened = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
      if (opened == nullptr || !file) std::abort();
      found.push_back({std::string(std::istreambuf_iterator<char>(file), {}), opened});
    }
    if (found.empty()) std::abort();
    return found;
  }();
  return all;
}
}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))
// What is not about a kernel: any driver does it.
#define FORWARD(name, types, values) \
  EXPORT int name types { return drivers()[0].get<int types>(#name) values; }

FORWARD(cuInit, (unsigned flags), (flags))
FORWARD(cuGetErrorName, (int code, const char** text), (code, text))
FORWARD(cuGetErrorString, (int code, const char** text), (code, text))
FORWARD(cuCtxGetCurrent, (void** context), (context))
FORWARD(cuCtxGetDevice, (int* device), (device))
FORWARD(cuDeviceGetAttribute, (int* value, int attribute, int device), (value, attribute, device))
FORWARD(cuMemPoolCreate, (void** pool, const void* props), (pool, props))
FORWARD(cuMemPoolSetAttribute, (void* pool, int attribute, void* value), (pool, attribute, value))
FORWARD(cuMemAllocFromPoolAsync, (u64* address, size_t bytes, void* pool, void* stream), (address, bytes, pool, stream))
FORWARD(cuMemFreeAsync, (u64 address, void* stream), (address, stream))
FORWARD(cuMemcpyDtoDAsync_v2, (u64 to, u64 from, size_t bytes, void* stream), (to, from, bytes, stream))
FORWARD(cuTensorMapEncodeTiled,
        (void* map, int type, unsigned rank, void* base, const u64* extent, const u64* strides, const unsigned* box, const unsigned* steps,
         int interleave, int swizzle, int promotion, int fill),
        (map, type, rank, base, extent, strides, box, steps, interleave, swizzle, promotion, fill))

EXPORT int cuModuleLoadData(void** module, const void* image) {
  for (const Driver& driver : drivers()) {
    // Headers first: where they are the same, so are the lengths.
    if (std::memcmp(image, driver.cubin.data(), 64) != 0 || std::memcmp(image, driver.cubin.data(), driver.cubin.size()) != 0) continue;
    auto* made = new Module{&driver, nullptr};
    *module = made;
    return driver.get<int(void**, const void*)>("cuModuleLoadData")(&made->inner, image);
  }
  return 200;
}
EXPORT int cuModuleUnload(void* module) {
  auto* of = static_cast<Module*>(module);
  const int code = of->driver->get<int(void*)>("cuModuleUnload")(of->inner);
  delete of;
  return code;
}
EXPORT int cuModuleGetFunction(void** function, void* module, const char* name) {
  auto* of = static_cast<Module*>(module);
  void* inner;
  const int code = of->driver->get<int(void**, void*, const char*)>("cuModuleGetFunction")(&inner, of->inner, name);
  if (code == 0) *function = new Function{of->driver, inner};
  return code;
}
EXPORT int cuFuncSetAttribute(void* function, int attribute, int value) {
  auto* of = static_cast<Function*>(function);
  return of->driver->get<int(void*, int, int)>("cuFuncSetAttribute")(of->inner, attribute, value);
}
EXPORT int cuLaunchKernelEx(const void* config, void* function, void** arguments, void** extra) {
  auto* of = static_cast<Function*>(function);
  return of->driver->get<int(const void*, void*, void**, void**)>("cuLaunchKernelEx")(config, of->inner, arguments, extra);
}
