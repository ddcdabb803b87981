// The CUDA driver's functions that the plugin calls, opened at run time and never linked.
//
// CUDA's own headers are not needed: these are the types and numbers of cuda.h that its interface fixes. kernels/src/launch/driver.rs
// has a test that holds their sizes against another copy of cuda.h.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mlac
{
using DeviceAddress = uint64_t;
using Module = void*;
using Function = void*;
using Context = void*;
using Stream = void*;

constexpr int kComputeCapabilityMajor = 75; // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
constexpr int kComputeCapabilityMinor = 76; // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR
constexpr int kMaxDynamicShared = 8;        // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
constexpr int kProgrammaticSerialization = 6; // CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION

struct LaunchAttribute
{
    int32_t id;
    char pad[4];
    union
    {
        char bytes[64];
        int32_t allowed;
    } value;
};
static_assert(sizeof(LaunchAttribute) == 72, "CUlaunchAttribute");

struct LaunchConfig
{
    uint32_t grid[3];
    uint32_t block[3];
    uint32_t sharedBytes;
    Stream stream;
    LaunchAttribute* attributes;
    uint32_t attributeCount;
};
static_assert(sizeof(LaunchConfig) == 56, "CUlaunchConfig");

struct alignas(64) TensorMap
{
    uint64_t opaque[16];
};
static_assert(sizeof(TensorMap) == 128, "CUtensorMap");

struct Driver
{
    int (*init)(unsigned);
    int (*errorName)(int, char const**);
    int (*errorString)(int, char const**);
    int (*currentContext)(Context*);
    int (*currentDevice)(int*);
    int (*deviceAttribute)(int*, int, int);
    int (*moduleLoadData)(Module*, void const*);
    int (*moduleUnload)(Module);
    int (*moduleFunction)(Function*, Module, char const*);
    int (*functionAttribute)(Function, int, int);
    int (*copyAsync)(DeviceAddress, DeviceAddress, size_t, Stream);
    int (*launch)(LaunchConfig const*, Function, void**, void**);
    int (*encodeTiled)(TensorMap*, int, uint32_t, void*, uint64_t const*, uint64_t const*, uint32_t const*, uint32_t const*, int,
        int, int, int);

    // Opened at the first call and kept. Throws found / needed / fix without a driver, every time.
    static Driver const& get();

    // Throws with the driver's words when a status is not 0.
    void check(int status, char const* action) const;
};
} // namespace mlac
