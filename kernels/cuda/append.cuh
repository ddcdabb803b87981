// K8: appends rows to the latent cache: the latent as it is, the key rotated by a table of cosines and sines.
//
// Half-split pairs: component l turns with l + kRope / 2. The table holds whatever scaling of frequencies and of attention
// (YaRN) the model has. One warp a token. An FP8 cache gets codes, keys in units of the scale, and the scale.
#pragma once
#include "common.cuh"
#if MLAC_FP8
#include "fp8.cuh"
#endif

// Mirrored by `params::AppendParams`.
struct AppendParams {
  const void* latent;     // [tokens, kRank]
  const void* key;        // [tokens, kRope], not rotated
  const float* cosines;   // [table_rows, kRope / 2]
  const float* sines;     // [table_rows, kRope / 2]
  const int* positions;   // [tokens]
  const int* slots;       // [tokens]: page * kPage + row, negative: none
  void* cache;            // [pages, kPage, kRank + kRope], or pages as fp8.cuh says
  int tokens;
  int table_rows;
  int cache_rows;
};

constexpr int kAppendWarps = 4;
constexpr int kRankSteps = kRank / 64;
constexpr int kRopeSteps = ceil_div(kRope, 64);

// Component `at` of a key and its partner, turned.
MLAC_DEVICE void rotate(const u16* key, const float* cosines, const float* sines, int at, float (&turned)[2]) {
  const float x = unpack(key[at]), y = unpack(key[at + kRope / 2]);
  turned[0] = x * cosines[at] - y * sines[at];
  turned[1] = y * cosines[at] + x * sines[at];
}

MLAC_KERNEL __launch_bounds__(kAppendWarps * 32) mlac_append(const __grid_constant__ AppendParams p) {
  const int token = blockIdx.x * kAppendWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
  wait_for_previous_kernel();
  let_next_kernel_start();
  if (token >= p.tokens) return;
  const int slot = p.slots[token], position = p.positions[token];
  // A slot outside of the cache, or a position outside of the table, writes nothing rather than anywhere.
  if (slot < 0 || slot >= p.cache_rows || position < 0 || position >= p.table_rows) return;
  const u16* latent = static_cast<const u16*>(p.latent) + (size_t)token * kRank;
  const u16* key = static_cast<const u16*>(p.key) + (size_t)token * kRope;
  const float* cosines = p.cosines + (size_t)position * (kRope / 2);
  const float* sines = p.sines + (size_t)position * (kRope / 2);
#if MLAC_FP8
  // Lane l has the latent's words l, l + 32, ... and the rotated pairs l, l + 32, ...
  float x[kRankSteps][2], turned[kRopeSteps][2];
  u32 largest = 0, largest_key = 0;
#pragma unroll
  for (int i = 0; i < kRankSteps; ++i) {
    const u32 word = reinterpret_cast<const u32*>(latent)[i * 32 + lane];
    x[i][0] = unpack((u16)word);
    x[i][1] = unpack((u16)(word >> 16));
    largest = max(largest, max(__float_as_uint(x[i][0]) & 0x7fffffff, __float_as_uint(x[i][1]) & 0x7fffffff));
  }
#pragma unroll
  for (int i = 0; i < kRopeSteps; ++i) {
    const int at = i * 32 + lane;
    if (at >= kRope / 2) break;
    rotate(key, cosines, sines, at, turned[i]);
    largest_key = max(largest_key, max(__float_as_uint(turned[i][0]) & 0x7fffffff, __float_as_uint(turned[i][1]) & 0x7fffffff));
  }
  for (int step = 16; step > 0; step /= 2) {
    largest = max(largest, __shfl_xor_sync(~0u, largest, step));
    largest_key = max(largest_key, __shfl_xor_sync(~0u, largest_key, step));
  }
  const float scale = row_scale(largest, largest_key);
  // Exact, of a power of two. Beside a scale that is NaN the codes may be anything.
  const float inverse = __uint_as_float(0x7f000000 - __float_as_uint(scale));
  u8* page = static_cast<u8*>(p.cache) + (size_t)(slot / kPage) * kPageBytes;
  const int in_page = slot % kPage;
  u16* codes = reinterpret_cast<u16*>(page + in_page * kRank);
  u16* keys = reinterpret_cast<u16*>(page + kKeysAt) + in_page * kRope;
#pragma unroll
  for (int i = 0; i < kRankSteps; ++i)
    codes[i * 32 + lane] = (u16)(e4m3_code(x[i][0] * inverse) | e4m3_code(x[i][1] * inverse) << 8);
#pragma unroll
  for (int i = 0; i < kRopeSteps; ++i) {
    const int at = i * 32 + lane;
    if (at >= kRope / 2) break;
    const u32 pair = pack_f16(turned[i][0] * inverse, turned[i][1] * inverse);
    keys[at] = (u16)pair;
    keys[at + kRope / 2] = (u16)(pair >> 16);
  }
  if (lane == 0) reinterpret_cast<float*>(page + kScalesAt)[in_page] = scale;
#else
  u16* row = static_cast<u16*>(p.cache) + (size_t)slot * (kRank + kRope);
  for (int i = lane; i < kRank / 8; i += 32) reinterpret_cast<uint4*>(row)[i] = reinterpret_cast<const uint4*>(latent)[i];
  for (int i = lane; i < kRope / 2; i += 32) {
    float turned[2];
    rotate(key, cosines, sines, i, turned);
    row[kRank + i] = narrow(turned[0]);
    row[kRank + i + kRope / 2] = narrow(turned[1]);
  }
#endif
}
