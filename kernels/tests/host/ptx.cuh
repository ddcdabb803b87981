// The CPU's version of cuda/ptx.cuh.
#pragma once
#include "machine.h"

#define MLAC_DEVICE inline
#define MLAC_CONSTEXPR constexpr
#define MLAC_KERNEL void
#define MLAC_DYNAMIC_SHARED(name) u8* const name = machine.shared

inline float exp2_fast(float x) { return std::exp2(x); }
inline float log2_fast(float x) { return std::log2(x); }
inline float reciprocal(float x) { return 1.0f / x; }
inline float minus_infinity() { return -INFINITY; }

inline u16 f16_bits(float x) {
  _Float16 h = (_Float16)x;
  u16 bits;
  std::memcpy(&bits, &h, 2);
  return bits;
}
inline float f16_value(u16 bits) {
  _Float16 h;
  std::memcpy(&h, &bits, 2);
  return (float)h;
}
inline u16 narrow(float x) {
#if MLAC_F16
  return f16_bits(x);
#else
  u32 bits = float_bits(x);
  if (x != x) return 0x7fff;
  return (u16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
#endif
}
inline float unpack(u16 bits) {
#if MLAC_F16
  return f16_value(bits);
#else
  return __uint_as_float((u32)bits << 16);
#endif
}
inline u32 pack(float low, float high) { return narrow(low) | (u32)narrow(high) << 16; }

inline u32 pack_f16(float low, float high) { return f16_bits(low) | (u32)f16_bits(high) << 16; }

// A factor of a multiplication.
inline float factor(u16 bits) { return MLAC_FP8 ? f16_value(bits) : unpack(bits); }

inline u32 multiply_f16(u32 a, u32 b) {
  return pack_f16(f16_value((u16)a) * f16_value((u16)b), f16_value((u16)(a >> 16)) * f16_value((u16)(b >> 16)));
}

#if MLAC_ARCH >= 890
// By the definition of e4m3, not by the bits of f16 as fp8.cuh does where there is no such instruction.
inline float e4m3_value(u8 code) {
  int exponent = code >> 3 & 15, mantissa = code & 7;
  float size = exponent == 0 ? std::ldexp((float)mantissa, -9) : std::ldexp(1.0f + mantissa / 8.0f, exponent - 7);
  if ((code & 0x7f) == 0x7f) size = NAN;
  return code & 0x80 ? -size : size;
}
inline u32 widen_e4m3(u16 codes) { return pack_f16(e4m3_value((u8)codes), e4m3_value((u8)(codes >> 8))); }
#endif

inline void wait_for_previous_kernel() {}
inline void let_next_kernel_start() {}

template <int Id, int Threads>
void named_barrier() {
  static_assert(Id > 0 && Id < 16 && Threads % 32 == 0, "a barrier of the hardware");
  machine.meet(machine.named[Id], Threads, "named barrier", [] {});
}
