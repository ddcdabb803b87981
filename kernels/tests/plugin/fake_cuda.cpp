// A libcuda.so.1 of the functions that the TensorRT plugin and the operator of ONNX Runtime call, for machines without a GPU: "device" memory is the host's, and a launch
// runs the kernels' own sources on the CPU (../host). The source before this file is the prologue and the kernels.
//
// MLAC_FAKE_LOG        file that every launch is appended to: name, CTAs, threads, shared bytes, dependent, blocks of arguments
// MLAC_FAKE_CAPABILITY compute capability of the device, for example 9.0
// MLAC_FAKE_FAIL       name of a function that fails
// MLAC_FAKE_CONTEXT    0: no context is current
#include <fstream>
#include <string>

#define FAKE_EXPORT extern "C" __attribute__((visibility("default")))

namespace fake {
struct Function {
  const char* name;
  size_t arguments;  // bytes of the block
  int shared;        // dynamic shared memory that was asked for
};
Function functions[] = {
    {"mlac_store", sizeof(StoreParams), 0},
    {"mlac_decode", sizeof(DecodeParams), 0},
#if HOST_PLANNED
    {"mlac_plan", sizeof(PlanParams), 0},
    {"mlac_combine", sizeof(DecodeParams), 0},
#endif
};
int modules = 0, allocations = 0;

std::string setting(const char* name, const char* otherwise) {
  const char* value = std::getenv(name);
  return value == nullptr ? otherwise : value;
}
bool fails(const char* name) { return setting("MLAC_FAKE_FAIL", "") == name; }

// cuda.h's CUlaunchConfig and CUlaunchAttribute.
struct Attribute {
  int id;
  char pad[4];
  int value;
  char rest[60];
};
struct Config {
  unsigned grid[3], block[3], shared;
  void* stream;
  Attribute* attributes;
  unsigned count;
};

template <typename Params>
Params block(void** arguments, int i) {
  Params params;
  std::memcpy(&params, arguments[i], sizeof params);
  return params;
}
}  // namespace fake

#define FAKE_FAIL(name) \
  if (fake::fails(name)) return 999

FAKE_EXPORT int cuInit(unsigned) {
  FAKE_FAIL("cuInit");
  return 0;
}
FAKE_EXPORT int cuGetErrorName(int, const char** text) {
  *text = "CUDA_ERROR_UNKNOWN";
  return 0;
}
FAKE_EXPORT int cuGetErrorString(int, const char** text) {
  *text = "the fake driver was told to fail";
  return 0;
}
FAKE_EXPORT int cuCtxGetCurrent(void** context) {
  FAKE_FAIL("cuCtxGetCurrent");
  static int here;
  *context = fake::setting("MLAC_FAKE_CONTEXT", "1") == "0" ? nullptr : &here;
  return 0;
}
FAKE_EXPORT int cuCtxGetDevice(int* device) {
  *device = 3;
  return 0;
}
FAKE_EXPORT int cuDeviceGetAttribute(int* value, int attribute, int device) {
  if (device != 3) return 101;
  const std::string capability = fake::setting("MLAC_FAKE_CAPABILITY", "9.0");
  const size_t dot = capability.find('.');
  if (attribute == 75) *value = std::atoi(capability.c_str());
  else if (attribute == 76) *value = std::atoi(capability.c_str() + dot + 1);
  else return 1;
  return 0;
}
FAKE_EXPORT int cuModuleLoadData(void** module, const void* image) {
  FAKE_FAIL("cuModuleLoadData");
  if (std::memcmp(image, "\x7f" "ELF", 4) != 0) return 200;
  ++fake::modules;
  *module = &fake::modules;
  return 0;
}
FAKE_EXPORT int cuModuleUnload(void*) {
  --fake::modules;
  return 0;
}
// Of the fake only: modules that are loaded.
FAKE_EXPORT int fakeModules() { return fake::modules; }
FAKE_EXPORT int cuModuleGetFunction(void** function, void*, const char* name) {
  FAKE_FAIL("cuModuleGetFunction");
  for (auto& candidate : fake::functions)
    if (std::strcmp(candidate.name, name) == 0) {
      *function = &candidate;
      return 0;
    }
  return 500;
}
FAKE_EXPORT int cuFuncSetAttribute(void* function, int attribute, int value) {
  if (attribute != 8) return 1;
  static_cast<fake::Function*>(function)->shared = value;
  return 0;
}
// cuda.h's CUmemPoolProps.
struct PoolProps {
  int alloc_type, handle_types, location_type, location;
  void* security;
  size_t max_size;
  char rest[56];
};
FAKE_EXPORT int cuMemPoolCreate(void** pool, const PoolProps* props) {
  FAKE_FAIL("cuMemPoolCreate");
  // CU_MEM_ALLOCATION_TYPE_PINNED and CU_MEM_LOCATION_TYPE_DEVICE are 1; nothing is shared or bounded.
  if (props->alloc_type != 1 || props->handle_types != 0 || props->location_type != 1 || props->location != 3 || props->security != nullptr ||
      props->max_size != 0 || std::any_of(props->rest, props->rest + 56, [](char c) { return c != 0; }))
    return 1;
  *pool = &fake::allocations;
  return 0;
}
FAKE_EXPORT int cuMemPoolSetAttribute(void* pool, int attribute, void* value) {
  // CU_MEMPOOL_ATTR_RELEASE_THRESHOLD is 4, a 64-bit number.
  return pool == &fake::allocations && attribute == 4 && *static_cast<u64*>(value) == ~0ull ? 0 : 1;
}
FAKE_EXPORT int cuMemAllocFromPoolAsync(u64* address, size_t bytes, void* pool, void*) {
  FAKE_FAIL("cuMemAllocFromPoolAsync");
  if (pool != &fake::allocations || bytes == 0) return 1;
  void* memory = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  std::memset(memory, 0xff, bytes);
  ++fake::allocations;
  *address = reinterpret_cast<u64>(memory);
  return 0;
}
FAKE_EXPORT int cuMemFreeAsync(u64 address, void*) {
  std::free(reinterpret_cast<void*>(address));
  --fake::allocations;
  return 0;
}
// Of the fake only: allocations that nobody gave back.
FAKE_EXPORT int fakeAllocations() { return fake::allocations; }
FAKE_EXPORT int cuMemcpyDtoDAsync_v2(u64 to, u64 from, size_t bytes, void*) {
  FAKE_FAIL("cuMemcpyDtoDAsync_v2");
  std::memcpy(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), bytes);
  return 0;
}
FAKE_EXPORT int cuTensorMapEncodeTiled(void* map, int type, u32 rank, void* base, const u64* extent, const u64* strides, const u32* box,
                                       const u32* steps, int interleave, int swizzle, int, int fill) {
  FAKE_FAIL("cuTensorMapEncodeTiled");
  // CU_TENSOR_MAP_DATA_TYPE_FLOAT16 is 6, BFLOAT16 9; SWIZZLE_128B is 3.
  if (type != (MLAC_F16 ? 6 : 9) || rank != 3 || box[0] != 64 || box[1] != 64 || box[2] != 1 || interleave != 0 || swizzle != 3 ||
      fill != 0 || (u64)map % 64 != 0)
    return 1;
  for (int i = 0; i < 3; ++i)
    if (steps[i] != 1 || extent[i] == 0) return 1;
#if HOST_TMA
  TensorMap ours{static_cast<const u16*>(base),
                 {(int)extent[0], (int)extent[1], (int)extent[2]},
                 {strides[0] / 2, strides[1] / 2}};
  std::memcpy(map, &ours, sizeof ours);
#else
  (void)base;
  (void)strides;
#endif
  return 0;
}
FAKE_EXPORT int cuLaunchKernelEx(const fake::Config* config, void* function, void** arguments, void** extra) {
  FAKE_FAIL("cuLaunchKernelEx");
  auto& f = *static_cast<fake::Function*>(function);
  const std::string name = f.name;
  if (extra != nullptr || config->grid[0] == 0 || config->grid[1] != 1 || config->grid[2] != 1 || config->block[1] != 1 ||
      config->block[2] != 1 || (int)config->shared > f.shared)
    return 1;
  // CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION is 6.
  const bool dependent = config->count == 1;
  if (config->count > 1 || (dependent && (config->attributes->id != 6 || config->attributes->value != 1))) return 1;
  const std::string log = fake::setting("MLAC_FAKE_LOG", "");
  if (!log.empty()) {
    std::ofstream file(log, std::ios::app);
    file << name << ' ' << config->grid[0] << ' ' << config->block[0] << ' ' << config->shared << ' ' << dependent << ' ';
    for (size_t i = 0; i < f.arguments; ++i) {
      char digits[3];
      std::snprintf(digits, sizeof digits, "%02x", static_cast<const u8*>(arguments[0])[i]);
      file << digits;
    }
    file << '\n';
  }
  const int blocks = (int)config->grid[0], threads = (int)config->block[0];
  if (name == "mlac_store") {
    const auto p = fake::block<StoreParams>(arguments, 0);
    machine.run(blocks, threads, 1, [&] { mlac_store(p); });
  } else if (name == "mlac_decode") {
    const auto p = fake::block<DecodeParams>(arguments, 0);
#if HOST_TMA
    const auto query = fake::block<TensorMap>(arguments, 1), cache = fake::block<TensorMap>(arguments, 2);
    machine.run(blocks, threads, 1, [&] { mlac_decode(p, query, cache); });
#else
    machine.run(blocks, threads, 1, [&] { mlac_decode(p); });
#endif
  }
#if HOST_PLANNED
  else if (name == "mlac_plan") {
    const auto p = fake::block<PlanParams>(arguments, 0);
    machine.run(blocks, threads, 1, [&] { mlac_plan(p); });
  } else if (name == "mlac_combine") {
    const auto p = fake::block<DecodeParams>(arguments, 0);
    machine.run(blocks, threads, 1, [&] { mlac_combine(p); });
  }
#endif
  return 0;
}
