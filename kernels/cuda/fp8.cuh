// The FP8 cache: a page is codes [kPage, kRank] of e4m3, rotated keys [kPage, kRope] of f16, scales [kPage] of f32.
// A token's row is scale * [codes | keys]. `fp8.rs` says why, and does the same arithmetic.
#pragma once
#include "common.cuh"

constexpr int kKeysAt = kPage * kRank;
constexpr int kScalesAt = kKeysAt + kPage * kRope * 2;
constexpr int kPageBytes = kScalesAt + kPage * 4;

// Four e4m3 numbers as f16, exactly, in two words.
MLAC_DEVICE uint2 widen_4(u32 codes) {
  uint2 wide;
#if MLAC_ARCH >= 890
  wide.x = widen_e4m3((u16)codes);
  wide.y = widen_e4m3((u16)(codes >> 16));
#else
  // A code's exponent and mantissa, put where f16 has its own, are the number times 2^(7 - 15); subnormal ones too.
  // NaN (0x7f) becomes 480 here: append writes none, it makes the scale NaN.
  constexpr u32 kUp = 0x5c005c00;  // 256, twice
  u32 low = (codes & 0xff) << 8 | (codes & 0xff00) << 16;
  u32 high = (codes >> 16 & 0xff) << 8 | (codes & 0xff000000);
  wide.x = multiply_f16((low & 0x80008000) | (low >> 1 & 0x3f803f80), kUp);
  wide.y = multiply_f16((high & 0x80008000) | (high >> 1 & 0x3f803f80), kUp);
#endif
  return wide;
}

MLAC_DEVICE uint4 widen_8(uint2 codes) {
  uint2 low = widen_4(codes.x), high = widen_4(codes.y);
  return make_uint4(low.x, low.y, high.x, high.y);
}

// Two bf16 numbers as f16: exact between 2^-14 and 65504, infinite beyond.
MLAC_DEVICE u32 bf16_to_f16(u32 pair) { return pack_f16(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000)); }

// The nearest code of a number of at most 448; halfway goes to the even one. The same integers on every GPU.
MLAC_DEVICE u32 e4m3_code(float x) {
  const u32 bits = __float_as_uint(x) & 0x7fffffff;
  // Beside 2^14 the step of f32 is 2^-9, that of e4m3's subnormals (below 2^-6).
  const u32 code = bits < 0x3c800000 ? __float_as_uint(__uint_as_float(bits) + 16384.0f) - 0x46800000
                                     : ((bits + 0x7ffff + (bits >> 20 & 1)) >> 20) - (120 << 3);
  return (__float_as_uint(x) >> 24 & 0x80) | min(code, 0x7eu);
}

// A power of two by which the largest latent comes to at most 448 and the largest rotated key below 32768; NaN when one of
// them, given by its bits without the sign, is not finite.
MLAC_DEVICE float row_scale(u32 latent, u32 key) {
  if (max(latent, key) >= 0x7f800000) return __uint_as_float(0x7fc00000);
  int exponent = (int)(latent >> 23) - 127 - 8 + ((latent & 0x7fffff) > 0x600000 ? 1 : 0);
  exponent = max(exponent, (int)(key >> 23) - 127 - 14);
  return __uint_as_float((u32)(max(exponent, -64) + 127) << 23);
}

// Factor of a token's column and its base-2 logarithm, side by side for two tokens; those beyond the request count as 1.
MLAC_DEVICE void put_factor(u8* factors, int token, float scale, bool valid) {
  scale = valid ? scale : 1.0f;
  reinterpret_cast<float2*>(factors)[token] = make_float2(scale, log2_fast(scale));
}
