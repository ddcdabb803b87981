// The CPU's version of cuda/ptx.cuh.
#pragma once
#include "machine.h"

#define MLAC_DEVICE inline
#define MLAC_KERNEL void
#define MLAC_DYNAMIC_SHARED(name) u8* const name = machine.shared

inline float exp2_fast(float x) { return std::exp2(x); }
inline float log2_fast(float x) { return std::log2(x); }
inline float reciprocal(float x) { return 1.0f / x; }
inline float minus_infinity() { return -INFINITY; }

inline u16 narrow(float x) {
#if MLAC_F16
  _Float16 h = (_Float16)x;
  u16 bits;
  std::memcpy(&bits, &h, 2);
  return bits;
#else
  u32 bits = float_bits(x);
  if (x != x) return 0x7fff;
  return (u16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
#endif
}
inline float unpack(u16 bits) {
#if MLAC_F16
  _Float16 h;
  std::memcpy(&h, &bits, 2);
  return (float)h;
#else
  return __uint_as_float((u32)bits << 16);
#endif
}
inline u32 pack(float low, float high) { return narrow(low) | (u32)narrow(high) << 16; }

inline void wait_for_previous_kernel() {}
inline void let_next_kernel_start() {}

template <int Id, int Threads>
void named_barrier() {
  static_assert(Id > 0 && Id < 16 && Threads % 32 == 0, "a barrier of the hardware");
  machine.meet(machine.named[Id], Threads, "named barrier", [] {});
}
