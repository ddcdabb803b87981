// Tiles of an FP8 cache for `mla_sm90.cuh`: pages come as they are, and become f16 tiles in shared memory.
//
// A warpgroup that takes a tile alone converts it alone; two that share it convert half each. A stage is given back as soon as its
// page is converted. The scale of a token is a factor of its column: it multiplies the scores, and the weights before they meet
// the values. The running maximum is of score * scale plus the scale's logarithm, so the weights that become f16 are at
// most 1, whatever the scales are; the denominator adds the weights before they are multiplied.
#pragma once
#include "fp8.cuh"
#include "sm90_load.cuh"

constexpr int kConverters = kSharedTiles ? kConsumers : 128;
constexpr int kSlots = kSharedTiles ? kBuffers : 2 * kBuffers;
constexpr int kTileAt = kStageAt;                             // f16 tiles
constexpr int kFactorsAt = kTileAt + kSlots * kStageBytes;    // float2 [64]: scale and its logarithm
constexpr int kPageAt = kFactorsAt + kSlots * kPage * 8;      // pages as they lie in the cache
constexpr int kMergeAt = kPageAt + kStages * kPageBytes;      // float [2][64][2]
constexpr bool kOverlap = false;

static_assert(kBuffers == 1 || (kSharedTiles && kBuffers == 2), "a warpgroup of its own turns over one tile");
static_assert(kPageBytes % 128 == 0, "pages are aligned for copies");

MLAC_DEVICE void load_cache(const DecodeParams& p, u32 shared, u32 full, u32 empty) {
  const u8* cache = static_cast<const u8*>(p.cache);
  fill_ring(p, full, empty, kPageBytes, [=](const Piece&, int page, int stage, u32 barrier) {
    bulk_load(shared + kPageAt + stage * kPageBytes, cache + (size_t)page * kPageBytes, kPageBytes, barrier);
  });
}

MLAC_DEVICE int tile_slot(int count, int group) { return kSharedTiles ? count % kBuffers : group; }

// Factor of the running maxima: here they are powers of two already.
MLAC_DEVICE float peak_scale(const DecodeParams&) { return 1.0f; }

MLAC_DEVICE void converters_barrier(int group) {
  if (kSharedTiles) named_barrier<7, kConsumers>();
  else warpgroup_barrier(group);
}

// Waits for a page and makes it a tile. Latents of rows beyond the request become zeros: they may be NaN, and meet weights of zero.
MLAC_DEVICE void await_tile(const Ring& ring, int slot, int count, const Piece& piece, int i) {
  const int stage = count % kStages;
  // With one buffer the tile before is in it until everyone's values are multiplied. With two, passing the barrier below
  // for the tile before said that of the one before that.
  if (kBuffers == 1) converters_barrier(ring.group);
  barrier_wait(ring.full + 8 * stage, count / kStages & 1);
  const u8* page = ring.memory + kPageAt + stage * kPageBytes;
  u8* tile = ring.memory + kTileAt + slot * kStageBytes;
  const int valid = piece.length - (piece.begin + i) * kTile;
  const int thread = (kSharedTiles ? ring.group * 128 : 0) + ring.warp * 32 + ring.lane;
#pragma unroll 4
  for (int u = thread; u < kPage * kRank / 8; u += kConverters) {
    const int row = u / (kRank / 8), chunk = u % (kRank / 8);
    uint4 wide = widen_8(reinterpret_cast<const uint2*>(page)[u]);
    if (row >= valid) wide = make_uint4(0, 0, 0, 0);
    *reinterpret_cast<uint4*>(tile + chunk / 8 * kSubTile + row * 128 + ((chunk ^ row) & 7) * 16) = wide;
  }
  for (int u = thread; u < kPage * kRope / 8; u += kConverters) {
    const int row = u / (kRope / 8), chunk = u % (kRope / 8);
    *reinterpret_cast<uint4*>(tile + (kLatentTiles + chunk / 8) * kSubTile + row * 128 + ((chunk ^ row) & 7) * 16) =
        reinterpret_cast<const uint4*>(page + kKeysAt)[u];
  }
  if (thread < kPage)
    put_factor(ring.memory + kFactorsAt + slot * kPage * 8, thread, reinterpret_cast<const float*>(page + kScalesAt)[thread], thread < valid);
  fence_async_proxy();
  converters_barrier(ring.group);
  if (ring.lane == 0) barrier_arrive(ring.empty + 8 * stage);
}

MLAC_DEVICE void release_tile(const Ring&, int) {}

// Scale and its logarithm of two neighbouring tokens at a time, from this thread's first column on.
MLAC_DEVICE const float4* factors_of(const Ring& ring, int slot, int column) {
  return reinterpret_cast<const float4*>(ring.memory + kFactorsAt + slot * kPage * 8) + column / 2;
}

// Scores in powers of two, and the largest, row by row, of this thread's scores plus their scales' logarithms.
MLAC_DEVICE void tops(float (&s)[kScoreRegisters], const Ring& ring, int slot, int column, float scale, float (&top)[2]) {
  const float4* factors = factors_of(ring, slot, column);
  top[0] = top[1] = minus_infinity();
#pragma unroll
  for (int j = 0; j < kScoreRegisters; j += 4) {
    const float4 of = factors[j];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      s[j + 2 * r] *= of.x * scale;
      s[j + 2 * r + 1] *= of.z * scale;
      top[r] = fmaxf(top[r], fmaxf(s[j + 2 * r] + of.y, s[j + 2 * r + 1] + of.w));
    }
  }
}

// Weights times their scales in place of the scores; `top` is of the row's tokens in this tile.
MLAC_DEVICE void weigh(float (&s)[kScoreRegisters], const Ring& ring, int slot, int column, float, const float (&top)[2],
                       float (&peak)[2], float (&sum)[2], float (&rescale)[2]) {
  const float4* factors = factors_of(ring, slot, column);
  float anchor[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float all = fmaxf(top[r], peak[r]);
    anchor[r] = all == minus_infinity() ? 0.0f : all;
    rescale[r] = exp2_fast(peak[r] - anchor[r]);
    peak[r] = all;
    sum[r] *= rescale[r];
  }
#pragma unroll
  for (int j = 0; j < kScoreRegisters; j += 4) {
    const float4 of = factors[j];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float x = exp2_fast(s[j + 2 * r] - anchor[r]), y = exp2_fast(s[j + 2 * r + 1] - anchor[r]);
      sum[r] += x + y;
      s[j + 2 * r] = x * of.x;
      s[j + 2 * r + 1] = y * of.z;
    }
  }
}

// bf16 queries become f16, in place and once: beyond 65504 they become infinite, and the output NaN.
MLAC_DEVICE void prepare_queries(const Ring& ring) {
#if !MLAC_F16
  const bool own = kGroup == 2;  // else the two warpgroups have the same queries
  u8* queries = ring.memory + (own ? ring.group * kStageBytes : 0);
  const int thread = (own ? 0 : ring.group * 128) + ring.warp * 32 + ring.lane;
  for (int u = thread; u < kStageBytes / 16; u += own ? 128 : kConsumers) {
    uint4* at = reinterpret_cast<uint4*>(queries) + u;
    const uint4 x = *at;
    *at = make_uint4(bf16_to_f16(x.x), bf16_to_f16(x.y), bf16_to_f16(x.z), bf16_to_f16(x.w));
  }
  fence_async_proxy();
  if (own) warpgroup_barrier(ring.group);
  else named_barrier<7, kConsumers>();
#endif
}
