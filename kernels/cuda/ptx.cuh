// Types, and the instructions that have no C++ of their own. `hopper.cuh` and `mma.cuh` hold those of their kernels.
// The tests replace these three files by ones of the same functions for the CPU: the kernels must not use anything else.
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

#define MLAC_DEVICE __device__ __forceinline__
#define MLAC_CONSTEXPR __host__ __device__ constexpr
#define MLAC_KERNEL extern "C" __global__ void
#define MLAC_DYNAMIC_SHARED(name) extern __shared__ __align__(1024) u8 name[]

MLAC_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

MLAC_DEVICE float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

MLAC_DEVICE float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

MLAC_DEVICE float minus_infinity() { return __int_as_float(0xff800000); }

// Two f16 numbers, `low` in the lower half.
MLAC_DEVICE u32 pack_f16(float low, float high) {
  u32 y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}

// Two numbers in the type of queries and output, `low` in the lower half.
MLAC_DEVICE u32 pack(float low, float high) {
#if MLAC_F16
  return pack_f16(low, high);
#else
  u32 y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
#endif
}

MLAC_DEVICE float unpack(u16 bits) {
#if MLAC_F16
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(bits));
  return y;
#else
  return __uint_as_float((u32)bits << 16);
#endif
}

MLAC_DEVICE u16 narrow(float x) { return (u16)pack(x, 0.0f); }

// The products of two pairs of f16.
MLAC_DEVICE u32 multiply_f16(u32 a, u32 b) {
  u32 y;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  return y;
}

#if MLAC_ARCH >= 890
// Two e4m3 numbers as f16, exactly; the one of the lower byte in the lower half.
MLAC_DEVICE u32 widen_e4m3(u16 codes) {
  u32 y;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(y) : "h"(codes));
  return y;
}
#endif

// Programmatic dependent launch: both are nothing when the launch did not ask for it.
MLAC_DEVICE void wait_for_previous_kernel() {
#if MLAC_ARCH >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

MLAC_DEVICE void let_next_kernel_start() {
#if MLAC_ARCH >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

template <int Id, int Threads>
MLAC_DEVICE void named_barrier() {
  asm volatile("bar.sync %0, %1;" ::"n"(Id), "n"(Threads) : "memory");
}
