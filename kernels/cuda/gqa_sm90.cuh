// GQA decode for sm_90a, the baseline: TMA brings keys and values, wgmma multiplies them, reading the cache is what takes the time.
//
// A unit is a KV head of a request. Its rows, query token x head of the group, are the first kRows of the 64 of a wgmma; a warp
// whose 16 rows are padding multiplies along and computes no weights. 384 threads: one warpgroup loads, two take alternate tiles
// of the piece and are added at its end, warpgroup 0 first. Queries are fragments in registers: nothing but the cache goes through
// shared memory.
#pragma once
#include "sm90_load.cuh"

constexpr int kRows = kHeads * kQueryTokens;
constexpr int kHeadTiles64 = kHeadDim / 64;
constexpr int kSubTile = 64 * 128;
constexpr int kHalfStage = kHeadTiles64 * kSubTile;  // keys, or values
constexpr int kStageBytes = 2 * kHalfStage;
constexpr int kConsumers = 256;
constexpr int kOutRegisters = kHeadDim / 2;

constexpr int kExchangeAt = kStages * kStageBytes;               // float [kRows][kHeadDim]
constexpr int kMergeAt = kExchangeAt + kRows * kHeadDim * 4;     // float [kRows][2]
constexpr int kBarrierAt = kMergeAt + kRows * 8;
constexpr int kSharedBytes = kBarrierAt + 8 * 2 * kStages;

static_assert(kRows <= 64 && kHeadDim % 64 == 0 && kHeadDim <= 128, "the rows of a unit are those of a wgmma");
static_assert(kTile == 64 && kPage == 64, "one page is one tile");

MLAC_DEVICE void load_cache(const DecodeParams& p, const TensorMap* keys, const TensorMap* values, u32 shared, u32 full, u32 empty) {
  fill_ring(p, full, empty, kStageBytes, [=](const Piece& piece, int page, int stage, u32 barrier) {
#pragma unroll
    for (int c = 0; c < kHeadTiles64; ++c) {
      u32 at = shared + stage * kStageBytes + c * kSubTile;
      tma_load(at, keys, piece.unit * kHeadDim + c * 64, 0, page, barrier);
      tma_load(at + kHalfStage, values, piece.unit * kHeadDim + c * 64, 0, page, barrier);
    }
  });
}

// Waits for a tile. Values beyond the request may be NaN and meet weights of zero: they become zeros.
MLAC_DEVICE void await_tile(u8* memory, u32 full, int stage, int count, int valid, int group, int warp, int lane) {
  barrier_wait(full + 8 * stage, count / kStages & 1);
  if (valid < kTile) {
    u8* values = memory + stage * kStageBytes + kHalfStage;
    for (int r = max(0, valid) + warp; r < kTile; r += 4)
#pragma unroll
      for (int c = 0; c < kHeadTiles64; ++c) *reinterpret_cast<u32*>(values + c * kSubTile + r * 128 + lane * 4) = 0;
    fence_async_proxy();
    if (group == 0) named_barrier<1, 128>();
    else named_barrier<2, 128>();
  }
}

// Weights in place of the scores of one of this thread's two rows, its running maximum and denominator.
template <int R>
MLAC_DEVICE void weigh(float (&s)[32], u64 seen, float scale, float& peak, float& sum, float& rescale) {
  float top = peak;
#pragma unroll
  for (int j = 0; j < 32; j += 4)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float& x = s[j + 2 * R + i];
      if (!(seen >> (j * 2 + i) & 1)) x = minus_infinity();
      top = fmaxf(top, x);
    }
  top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
  top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
  const float anchor = top == minus_infinity() ? 0.0f : top * scale;
  rescale = exp2_fast(peak * scale - anchor);
  peak = top;
  float added = 0.0f;
#pragma unroll
  for (int j = 0; j < 32; j += 4) {
    s[j + 2 * R] = exp2_fast(s[j + 2 * R] * scale - anchor);
    s[j + 2 * R + 1] = exp2_fast(s[j + 2 * R + 1] * scale - anchor);
    added += s[j + 2 * R] + s[j + 2 * R + 1];
  }
  sum = sum * rescale + added;
}

MLAC_DEVICE void compute(const DecodeParams& p, u8* memory, u32 shared, u32 full, u32 empty) {
  const int group = __shfl_sync(~0u, threadIdx.x / 128 - 1, 0);  // 0 or 1, known to be uniform
  const int warp = __shfl_sync(~0u, threadIdx.x % 128 / 32, 0), lane = threadIdx.x % 32;
  const int row = warp * 16 + lane / 4, column = lane % 4 * 2;
  const float scale = p.scale * kLog2e;
  float* exchange = reinterpret_cast<float*>(memory + kExchangeAt);
  float* merge = reinterpret_cast<float*>(memory + kMergeAt);

  Walk walk(p);
  Piece piece;
  int base = 0;  // tiles of the pieces before
  while (walk.next(p, piece)) {
    // Rows r = query token * kHeads + head; those beyond kRows are zeros.
    u32 q[kHeadDim / 4];
    const u16* queries = static_cast<const u16*>(p.q) + (size_t)piece.request * kQueryTokens * kAllHeads * kHeadDim;
#pragma unroll
    for (int k = 0; k < kHeadDim / 4; ++k) {
      const int r = row + k % 2 * 8, c = k / 4 * 16 + column + k % 4 / 2 * 8;
      const size_t at = ((size_t)(r / kHeads) * kAllHeads + piece.unit * kHeads + r % kHeads) * kHeadDim + c;
      q[k] = r < kRows ? *reinterpret_cast<const u32*>(queries + at) : 0;
    }
    // Tiles between these positions are seen whole by every query token; the others ask row by row.
    const int first = piece.length - kQueryTokens;
    const int whole_from = window_start(piece.length - 1);
    const int whole_to = kMask == 0 ? piece.length : kMask == 1 ? first + 1 : first;

    float o[kOutRegisters];
#pragma unroll
    for (int i = 0; i < kOutRegisters; ++i) o[i] = 0.0f;
    float peak[2] = {minus_infinity(), minus_infinity()};
    float sum[2] = {0.0f, 0.0f};
    const int count = piece.end - piece.begin;
    for (int i = group; i < count; i += 2) {
      const int stage = (base + i) % kStages, start = (piece.begin + i) * kTile;
      await_tile(memory, full, stage, base + i, piece.length - start, group, warp, lane);
      const u32 keys = shared + stage * kStageBytes, values = keys + kHalfStage;
      float s[32];
      pin(s);
      pin(q);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kHeadDim / 16; ++k)
        wgmma_scores(s, q + 4 * k, descriptor(kDescriptorK, keys + k / 4 * kSubTile + k % 4 * 32), k > 0);
      wgmma_commit();
      wgmma_wait<0>();
      pin(s);

      float rescale[2] = {1.0f, 1.0f};
      const bool edge = start < whole_from || start + kTile > whole_to;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (8 * r >= kRows || warp * 16 + 8 * r >= kRows) {
#pragma unroll
          for (int j = 0; j < 32; j += 4) s[j + 2 * r] = s[j + 2 * r + 1] = 0.0f;
          continue;
        }
        u64 seen = ~0ull;
        if (edge) {
          const int token = min(kQueryTokens - 1, (row + 8 * r) / kHeads);
          seen = view_of(piece.length, token, kMask == 2 ? p.tree[piece.request * kQueryTokens + token] : 0).columns(start) >> column;
        }
        if (r == 0) weigh<0>(s, seen, scale, peak[0], sum[0], rescale[0]);
        else weigh<1>(s, seen, scale, peak[1], sum[1], rescale[1]);
      }
      u32 weights[16];
#pragma unroll
      for (int j = 0; j < 16; ++j) weights[j] = pack(s[2 * j], s[2 * j + 1]);
#pragma unroll
      for (int j = 0; j < kOutRegisters; ++j) o[j] *= rescale[j / 2 % 2];
      pin(o);
      pin(weights);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < 4; ++k) wgmma_values(o, weights + 4 * k, descriptor(kDescriptorMn, values + k * 2048));
      wgmma_commit();
      wgmma_wait<0>();
      pin(o);
      if (lane == 0) barrier_arrive(empty + 8 * stage);
    }
    base += count;

#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[r] += __shfl_xor_sync(~0u, sum[r], 1);
      sum[r] += __shfl_xor_sync(~0u, sum[r], 2);
    }
    if (group == 1) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int in_unit = row + 8 * r;
        if (in_unit >= kRows) continue;
        if (lane % 4 == 0) {
          merge[2 * in_unit] = peak[r];
          merge[2 * in_unit + 1] = sum[r];
        }
#pragma unroll
        for (int j = 0; j < kOutRegisters; j += 4)
          *reinterpret_cast<float2*>(exchange + in_unit * kHeadDim + j * 2 + column) = make_float2(o[j + 2 * r], o[j + 2 * r + 1]);
      }
      named_barrier<3, kConsumers>();
      named_barrier<4, kConsumers>();  // read: the next piece may write
      continue;
    }
    named_barrier<3, kConsumers>();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int in_unit = row + 8 * r;
      if (in_unit >= kRows) continue;
      const int head = piece.unit * kHeads + in_unit % kHeads, token = in_unit / kHeads;
      const float other_peak = merge[2 * in_unit], top = fmaxf(peak[r], other_peak);
      const float anchor = top == minus_infinity() ? 0.0f : top * scale;
      const float own = exp2_fast(peak[r] * scale - anchor), other = exp2_fast(other_peak * scale - anchor);
      const float all = sum[r] * own + merge[2 * in_unit + 1] * other;
      const float lse = all > 0.0f ? anchor + log2_fast(all) : minus_infinity();
      const size_t at = ((size_t)piece.request * kQueryTokens + token) * kAllHeads + head;
      const size_t in_parts = (size_t)piece.slot * kRows + in_unit;
      float denominator = all;
      if (piece.slot < 0 && kSinks) denominator += exp2_fast(p.sinks[head] * kLog2e - anchor);
      const float inverse = all > 0.0f ? reciprocal(denominator) : 0.0f;
      if (lane % 4 == 0) {
        if (piece.slot >= 0) p.lse_part[in_parts] = lse;
        else p.lse[at] = lse * kLn2;
      }
#pragma unroll
      for (int j = 0; j < kOutRegisters; j += 4) {
        const int c = j * 2 + column;
        const float2 theirs = *reinterpret_cast<const float2*>(exchange + in_unit * kHeadDim + c);
        const float x = (o[j + 2 * r] * own + theirs.x * other) * inverse, y = (o[j + 2 * r + 1] * own + theirs.y * other) * inverse;
        if (piece.slot >= 0) *reinterpret_cast<float2*>(p.out_part + in_parts * kHeadDim + c) = make_float2(x, y);
        else *reinterpret_cast<u32*>(static_cast<u16*>(p.out) + at * kHeadDim + c) = pack(x, y);
      }
    }
    named_barrier<4, kConsumers>();
  }
}

MLAC_KERNEL __launch_bounds__(384, 1)
mlac_decode(const __grid_constant__ DecodeParams p, const __grid_constant__ TensorMap key_map,
            const __grid_constant__ TensorMap value_map) {
  MLAC_DYNAMIC_SHARED(memory);
  const u32 shared = shared_address(memory);
  const u32 full = shared + kBarrierAt;
  const u32 empty = full + 8 * kStages;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(full + 8 * i, 1);
      barrier_init(empty + 8 * i, 4);
    }
    fence_barrier_init();
    tma_prefetch_map(&key_map);
    tma_prefetch_map(&value_map);
  }
  __syncthreads();
  wait_for_previous_kernel();
  if (threadIdx.x < 128) {
    keep_registers<24>();
    if (threadIdx.x == 0) load_cache(p, &key_map, &value_map, shared, full, empty);
    if (threadIdx.x == 32) let_next_kernel_start();
  } else {
    take_registers<240>();
    compute(p, memory, shared, full, empty);
  }
}
