// A libcuda.so.1 for machines without a GPU: "device" memory is the host's. It knows every allocation, so that the fake
// TensorRT can ask whether what it was given is device memory, and as much as it needs.
//
// MLAC_FAKE_CAPABILITY  compute capability of the device, for example 9.0
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {
std::map<uint64_t, size_t> held;
int context, stream;
}  // namespace

// Of the fake only.
EXPORT int fakeHolds(uint64_t address, size_t bytes) {
  auto next = held.upper_bound(address);
  if (next == held.begin()) return 0;
  --next;
  return address + bytes <= next->first + next->second;
}

EXPORT int cuInit(unsigned) { return 0; }
EXPORT int cuGetErrorName(int, const char** text) { return *text = "CUDA_ERROR_FAKE", 0; }
EXPORT int cuGetErrorString(int, const char** text) { return *text = "the fake driver refuses", 0; }
EXPORT int cuDeviceGetCount(int* count) { return *count = 1, 0; }
EXPORT int cuDeviceGet(int* device, int) { return *device = 0, 0; }
EXPORT int cuDeviceGetName(char* name, int length, int) { return std::strncpy(name, "Fake GPU", length), 0; }
EXPORT int cuDeviceTotalMem_v2(size_t* bytes, int) { return *bytes = size_t{1} << 30, 0; }
EXPORT int cuDevicePrimaryCtxRetain(void** made, int) { return *made = &context, 0; }
EXPORT int cuDevicePrimaryCtxRelease_v2(int) { return 0; }
EXPORT int cuCtxSetCurrent(void*) { return 0; }
EXPORT int cuDeviceGetAttribute(int* value, int attribute, int) {
  const char* set = std::getenv("MLAC_FAKE_CAPABILITY");
  const std::string capability = set == nullptr ? "9.0" : set;
  const size_t dot = capability.find('.');
  *value = 1;
  if (attribute == 75) *value = std::atoi(capability.c_str());
  if (attribute == 76) *value = std::atoi(capability.c_str() + dot + 1);
  return 0;
}
EXPORT int cuMemAlloc_v2(uint64_t* address, size_t bytes) {
  void* memory = std::malloc(bytes);
  // What nobody wrote must not matter.
  std::memset(memory, 0xa5, bytes);
  *address = reinterpret_cast<uint64_t>(memory);
  held[*address] = bytes;
  return 0;
}
EXPORT int cuMemFree_v2(uint64_t address) {
  if (held.erase(address) == 0) return 1;
  std::free(reinterpret_cast<void*>(address));
  return 0;
}
EXPORT int cuMemcpyHtoD_v2(uint64_t to, const void* from, size_t bytes) {
  if (!fakeHolds(to, bytes)) return 1;
  return std::memcpy(reinterpret_cast<void*>(to), from, bytes), 0;
}
EXPORT int cuMemcpyDtoH_v2(void* to, uint64_t from, size_t bytes) {
  if (!fakeHolds(from, bytes)) return 1;
  return std::memcpy(to, reinterpret_cast<const void*>(from), bytes), 0;
}
EXPORT int cuMemsetD8Async(uint64_t to, unsigned char byte, size_t bytes, void*) {
  if (!fakeHolds(to, bytes)) return 1;
  return std::memset(reinterpret_cast<void*>(to), byte, bytes), 0;
}
EXPORT int cuStreamCreate(void** made, unsigned) { return *made = &stream, 0; }
EXPORT int cuStreamDestroy_v2(void*) { return 0; }
EXPORT int cuStreamSynchronize(void*) { return 0; }
