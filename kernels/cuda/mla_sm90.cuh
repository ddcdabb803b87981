// MLA decode for sm_90a: one token, several (verification of drafts), short windows, by its constants.
//
// 384 threads: one warpgroup loads (warp 0 the cache, warp 1 the queries), two warpgroups compute.
//   kGroup = 1: the two take alternate tiles of one row tile and merge at the end of the piece.
//   kGroup = 2: the two take all tiles, each for a row tile of its own; a tile is loaded once for both.
//   kColumnGroups = 2 (latent beyond 256): both take all tiles of one row tile; each multiplies the scores of half of a tile's tokens,
//   and half of the values' columns. Between the two they exchange row maxima, and weights where the tile's rotated keys were.
// A warpgroup's row tile is 64 heads of one query token, so masks are per column only.
// Scores: wgmma m64n{kScoreTokens}k16, both operands in shared memory. Output: m64n{kOutColumns}k16, weights in registers or, exchanged, in
// shared memory, values the same tile read by columns.
#pragma once
#include "common.cuh"
#include "hopper.cuh"

constexpr int kLatentTiles = kRank / 64;
constexpr int kRowTiles64 = kLatentTiles + ceil_div(kRope, 64);  // 64-column tiles of 16 bits in a row
constexpr int kSubTile = 64 * 128;                               // bytes of 64 rows of one
constexpr int kStageBytes = kRowTiles64 * kSubTile;
constexpr int kQueryBytes = kGroup * kStageBytes;
constexpr int kScoreSteps = (kRank + kRope) / 16;
constexpr int kConsumers = 256;
// Whole 64-column tiles: with an odd number of them the two warpgroups share one, and write the same numbers there.
constexpr int kOutColumns = ceil_div(kLatentTiles, kColumnGroups) * 64;
constexpr int kOutRegisters = kOutColumns / 2;
// Tokens of a tile whose scores a warpgroup multiplies.
constexpr int kScoreTokens = kTile / kColumnGroups;
constexpr int kScoreRegisters = kScoreTokens / 2;
// Exchanged weights take the place of the tile's rotated keys, and none are kept in registers.
constexpr int kWeightsInTile = kLatentTiles * kSubTile;
constexpr int kWeightRegisters = MLAC_EXCHANGED ? 1 : 16;
constexpr bool kSharedTiles = kGroup == 2 || kColumnGroups == 2;
constexpr int kStageAt = kQueryBytes;  // of the dynamic shared memory, which begins at a multiple of 1024

// What a computing thread finds its tiles by.
struct Ring {
  u8* memory;
  u32 full, empty;  // mbarriers of the stages
  int group, warp, lane;
};

MLAC_DEVICE void warpgroup_barrier(int group) {
  if (group == 0) named_barrier<1, 128>();
  else named_barrier<2, 128>();
}

#if MLAC_FP8
#include "sm90_fp8.cuh"
#else
#include "sm90_tiles.cuh"
#endif
#include "sm90_output.cuh"

constexpr int kBarrierAt = kMergeAt + 1024;
constexpr int kSharedBytes = kBarrierAt + 8 * (2 * kStages + 2);

static_assert(kRank % 64 == 0 && kOutColumns <= 256, "a warpgroup's registers hold 64 x 256 of the output");
static_assert(kGroup == 1 || kColumnGroups == 1, "the warpgroups share a tile in one way");
static_assert(kRope % 16 == 0 && kTile == 64 && kPage == 64 && kHeadTile == 64, "one page is one tile");

MLAC_DEVICE void load_queries(const DecodeParams& p, const TensorMap* map, u32 shared, u32 full, u32 empty) {
  Walk walk(p);
  Piece piece;
  u32 parity = 1;
  while (walk.next(p, piece)) {
    barrier_wait(empty, parity);
    parity ^= 1;
    barrier_expect(full, kQueryBytes);
    for (int g = 0; g < kGroup; ++g) {
      // A group's second row tile may lie beyond the last one: its numbers are never stored.
      int row_tile = min(piece.unit * kGroup + g, kRowTiles - 1);
      int token = piece.request * kQueryTokens + row_tile / kHeadTiles;
#pragma unroll
      for (int c = 0; c < kRowTiles64; ++c)
        tma_load(shared + g * kStageBytes + c * kSubTile, map, c * 64, row_tile % kHeadTiles * 64, token, full);
    }
  }
}

MLAC_DEVICE void multiply_scores(float (&s)[kScoreRegisters], u32 query, u32 tile) {
#pragma unroll
  for (int k = 0; k < kScoreSteps; ++k) {
    u32 at = k / 4 * kSubTile + k % 4 * 32;
    wgmma_scores(s, descriptor(kDescriptorK, query + at), descriptor(kDescriptorK, tile + at), k > 0);
  }
}

#if MLAC_EXCHANGED
// Weights of all of a tile's tokens, which both warpgroups put there.
MLAC_DEVICE void multiply_values(float (&o)[kOutRegisters], const u32 (&)[1], u32 weights, u32 tile) {
#pragma unroll
  for (int k = 0; k < 4; ++k)
    wgmma_values(o, descriptor(kDescriptorK, weights + k * 32), descriptor(kDescriptorMn, tile + k * 2048));
}
#else
MLAC_DEVICE void multiply_values(float (&o)[kOutRegisters], const u32 (&weights)[16], u32, u32 tile) {
#pragma unroll
  for (int k = 0; k < 4; ++k) wgmma_values(o, weights + 4 * k, descriptor(kDescriptorMn, tile + k * 2048));
}
#endif

// Only the bounds of what is seen whole stay in registers; a tile at an edge asks for the rest again.
struct Edges {
  int from, to;
};

// Scores of tokens that are not seen become minus infinity.
MLAC_DEVICE void mask(float (&s)[kScoreRegisters], const DecodeParams& p, const Piece& piece, int token, const Edges& edges, int start, int column) {
  if (start >= edges.from && start + kTile <= edges.to) return;
  const View view = view_of(piece.length, token, kMask == 2 ? p.tree[piece.request * kQueryTokens + token] : 0);
  const u64 seen = view.columns(start) >> column;
#pragma unroll
  for (int j = 0; j < kScoreRegisters; ++j)
    if (!(seen >> (j / 4 * 8 + j % 2) & 1)) s[j] = minus_infinity();
}

// Masks, running maximum, weights in place of the scores and, when they are exchanged, in shared memory, denominators.
MLAC_DEVICE void soften(float (&s)[kScoreRegisters], const DecodeParams& p, const Ring& ring, const Piece& piece, int token,
                        const Edges& edges, int start, int slot, int row, int column, float scale, float (&peak)[2], float (&sum)[2],
                        float (&rescale)[2]) {
  mask(s, p, piece, token, edges, start, column);
  float top[2];
  tops(s, ring, slot, column, scale, top);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    top[r] = fmaxf(top[r], __shfl_xor_sync(~0u, top[r], 1));
    top[r] = fmaxf(top[r], __shfl_xor_sync(~0u, top[r], 2));
  }
#if MLAC_EXCHANGED
  float* tops_of_rows = reinterpret_cast<float*>(ring.memory + kMergeAt);  // [2][64]
  if (ring.lane % 4 == 0) {
    tops_of_rows[ring.group * 64 + row] = top[0];
    tops_of_rows[ring.group * 64 + row + 8] = top[1];
  }
  // Both have multiplied their scores: the rotated keys are done with.
  named_barrier<3, kConsumers>();
#pragma unroll
  for (int r = 0; r < 2; ++r) top[r] = fmaxf(tops_of_rows[row + 8 * r], tops_of_rows[64 + row + 8 * r]);
#endif
  weigh(s, ring, slot, column, scale, top, peak, sum, rescale);
#if MLAC_EXCHANGED
  u8* shared_weights = ring.memory + kTileAt + slot * kStageBytes + kWeightsInTile;
#pragma unroll
  for (int j = 0; j < kScoreRegisters; j += 2) {
    const int at_row = row + j / 2 % 2 * 8, at = j / 4 * 8 + column;
    *reinterpret_cast<u32*>(shared_weights + at_row * 128 + ((at / 8 ^ at_row) & 7) * 16 + at % 8 * 2) = pack_weights(s[j], s[j + 1]);
  }
  fence_async_proxy();
  named_barrier<4, kConsumers>();
#endif
}

// Weights that are not exchanged stay in registers, once the values of the tile before are multiplied.
MLAC_DEVICE void keep_weights(u32 (&weights)[kWeightRegisters], const float (&s)[kScoreRegisters]) {
#if !MLAC_EXCHANGED
#pragma unroll
  for (int j = 0; j < kWeightRegisters; ++j) weights[j] = pack_weights(s[2 * j], s[2 * j + 1]);
#endif
}

MLAC_DEVICE void compute(const DecodeParams& p, u8* memory, u32 shared, u32 full, u32 empty, u32 query_full, u32 query_empty) {
  const int group = __shfl_sync(~0u, threadIdx.x / 128 - 1, 0);  // 0 or 1, known to be uniform
  const int thread = threadIdx.x % 128;
  const int warp = thread / 32, lane = thread % 32;
  const int row = warp * 16 + lane / 4;
  const int column = lane % 4 * 2;
  const int token_column = column + (kColumnGroups == 2 ? group * kScoreTokens : 0);
  // The first of this warpgroup's output columns, in 64-column tiles.
  const int value_tile = kColumnGroups == 2 ? group * (kLatentTiles - kOutColumns / 64) : 0;
  const u32 score_rows = kColumnGroups == 2 ? group * kScoreTokens * 128 : 0;  // bytes to its tokens in a 64-column tile
  const Ring ring{memory, full, empty, group, warp, lane};
  const float scale = p.scale * kLog2e;
  float* exchange = reinterpret_cast<float*>(memory);  // the queries' memory, when they are done with
  float* merge = reinterpret_cast<float*>(memory + kMergeAt);

  Walk walk(p);
  Piece piece;
  int base = 0;  // tiles of the pieces before
  u32 query_parity = 0;
  while (walk.next(p, piece)) {
    const int row_tile = piece.unit * kGroup + (kGroup == 2 ? group : 0);
    const bool active = row_tile < kRowTiles;
    const int token = min(row_tile, kRowTiles - 1) / kHeadTiles;
    Edges edges;
    {
      const View view = view_of(piece.length, token, kMask == 2 ? p.tree[piece.request * kQueryTokens + token] : 0);
      edges.from = view.lo;
      edges.to = kMask == 2 ? view.draft : view.hi;
    }

    float o[kOutRegisters];
#pragma unroll
    for (int i = 0; i < kOutRegisters; ++i) o[i] = 0.0f;
    float peak[2] = {minus_infinity(), minus_infinity()};
    float sum[2] = {0.0f, 0.0f};

    barrier_wait(query_full, query_parity);
    query_parity ^= 1;
    prepare_queries(ring);
    const u32 query = shared + (kGroup == 2 ? group * kStageBytes : 0);
    const int count = piece.end - piece.begin;
    float s[kScoreRegisters];
    u32 weights[kWeightRegisters] = {};
    float rescale[2];
    // The scores of tile i are multiplied while the values of the tile before still are, and its softmax runs beside them.
    constexpr int kStep = kSharedTiles ? 1 : 2;
    int i = kSharedTiles ? 0 : group;
    while (i < count) {
      int slot = tile_slot(base + i, group);
      await_tile(ring, slot, base + i, piece, i);
      pin(s);
      wgmma_fence();
      multiply_scores(s, query, shared + kTileAt + slot * kStageBytes + score_rows);
      wgmma_commit();
      wgmma_wait<0>();
      pin(s);
      soften(s, p, ring, piece, token, edges, (piece.begin + i) * kTile, slot, row, token_column, scale, peak, sum, rescale);
      if (!kOverlap) {
#pragma unroll
        for (int j = 0; j < kOutRegisters; ++j) o[j] *= rescale[j / 2 % 2];
      }
      keep_weights(weights, s);
      int held = slot;
      for (i += kStep; kOverlap && i < count; i += kStep) {
        slot = tile_slot(base + i, group);
        await_tile(ring, slot, base + i, piece, i);
        pin(s);
        pin(o);
        pin(weights);
        wgmma_fence();
        multiply_scores(s, query, shared + kTileAt + slot * kStageBytes + score_rows);
        wgmma_commit();
        multiply_values(o, weights, shared + kTileAt + held * kStageBytes + kWeightsInTile,
                      shared + kTileAt + held * kStageBytes + value_tile * kSubTile);
        wgmma_commit();
        wgmma_wait<1>();
        pin(s);
        soften(s, p, ring, piece, token, edges, (piece.begin + i) * kTile, slot, row, token_column, scale, peak, sum, rescale);
        wgmma_wait<0>();
        pin(o);
        pin(weights);
        release_tile(ring, held);
        held = slot;
        keep_weights(weights, s);
#pragma unroll
        for (int j = 0; j < kOutRegisters; ++j) o[j] *= rescale[j / 2 % 2];
      }
      pin(o);
      pin(weights);
      wgmma_fence();
      multiply_values(o, weights, shared + kTileAt + held * kStageBytes + kWeightsInTile,
                      shared + kTileAt + held * kStageBytes + value_tile * kSubTile);
      wgmma_commit();
      wgmma_wait<0>();
      pin(o);
      release_tile(ring, held);
    }
    base += count;

#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[r] += __shfl_xor_sync(~0u, sum[r], 1);
      sum[r] += __shfl_xor_sync(~0u, sum[r], 2);
    }
#if MLAC_EXCHANGED
    // Each has the weights of half of the tokens.
    float* sums = merge + 128;  // [2][64]
    if (lane % 4 == 0) {
      sums[group * 64 + row] = sum[0];
      sums[group * 64 + row + 8] = sum[1];
    }
    named_barrier<5, kConsumers>();
    sum[0] = sums[row] + sums[64 + row];
    sum[1] = sums[row + 8] + sums[64 + row + 8];
    // No barrier after the reading: the other warpgroup writes sums again behind two barriers of the next piece's tiles, or, when that piece
    // has none, behind its queries, which come when every warp has said below that it is done with these.
    __syncwarp();
#endif
    float inverse[2];
    const bool store = lane % 4 == 0;
    if (kSharedTiles) {
      // The queries were read for the last time: the next ones may come.
      if (lane == 0) barrier_arrive(query_empty);
      if (active) {
        int slot_row = piece.slot >= 0 ? (piece.slot * kGroup + (kGroup == 2 ? group : 0)) * 64 : 0;
        denominators(p, piece, row_tile, slot_row, peak, sum, row, store && (kColumnGroups == 1 || group == 0), inverse);
        finish_half<0>(o, p, piece, row_tile, slot_row, inverse, row, column + value_tile * 64);
        finish_half<1>(o, p, piece, row_tile, slot_row, inverse, row, column + value_tile * 64);
      }
      continue;
    }

    // Two halves of one row tile: each warpgroup ends with half of the columns.
    if (store) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        merge[(group * 64 + row + 8 * r) * 2] = peak[r];
        merge[(group * 64 + row + 8 * r) * 2 + 1] = sum[r];
      }
    }
    named_barrier<3, kConsumers>();
    float own[2], other[2], all[2], top[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float peak0 = merge[(row + 8 * r) * 2], sum0 = merge[(row + 8 * r) * 2 + 1];
      float peak1 = merge[(64 + row + 8 * r) * 2], sum1 = merge[(64 + row + 8 * r) * 2 + 1];
      top[r] = fmaxf(peak0, peak1);
      float anchor = top[r] == minus_infinity() ? 0.0f : top[r] * peak_scale(p);
      float scale0 = exp2_fast(peak0 * peak_scale(p) - anchor), scale1 = exp2_fast(peak1 * peak_scale(p) - anchor);
      all[r] = sum0 * scale0 + sum1 * scale1;
      own[r] = group == 0 ? scale0 : scale1;
      other[r] = group == 0 ? scale1 : scale0;
    }
    const int slot_row = piece.slot >= 0 ? piece.slot * 64 : 0;
    denominators(p, piece, row_tile, slot_row, top, all, row, store && group == 0, inverse);
    if (group == 0) {
      named_barrier<4, kConsumers>();
      add_half<0, true>(o, exchange, thread, own, other);
      named_barrier<5, kConsumers>();
      put_half<1>(o, exchange, thread);
      fence_async_proxy();
      named_barrier<6, kConsumers>();
      finish_half<0>(o, p, piece, row_tile, slot_row, inverse, row, column);
    } else {
      put_half<0>(o, exchange, thread);
      named_barrier<4, kConsumers>();
      named_barrier<5, kConsumers>();
      named_barrier<6, kConsumers>();
      add_half<1, false>(o, exchange, thread, own, other);
      fence_async_proxy();
      __syncwarp();
      if (lane == 0) barrier_arrive(query_empty);
      finish_half<1>(o, p, piece, row_tile, slot_row, inverse, row, column);
    }
  }
}

MLAC_KERNEL __launch_bounds__(384, 1)
mlac_decode(const __grid_constant__ DecodeParams p, const __grid_constant__ TensorMap query_map
#if !MLAC_FP8
            , const __grid_constant__ TensorMap cache_map
#endif
) {
  MLAC_DYNAMIC_SHARED(memory);
  const u32 shared = shared_address(memory);
  const u32 full = shared + kBarrierAt;
  const u32 empty = full + 8 * kStages;
  const u32 query_full = empty + 8 * kStages, query_empty = query_full + 8;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(full + 8 * i, 1);
      barrier_init(empty + 8 * i, kSharedTiles ? 8 : 4);
    }
    barrier_init(query_full, 1);
    barrier_init(query_empty, kSharedTiles ? 8 : 4);
    fence_barrier_init();
    tma_prefetch_map(&query_map);
#if !MLAC_FP8
    tma_prefetch_map(&cache_map);
#endif
  }
  __syncthreads();
  wait_for_previous_kernel();
  if (threadIdx.x < 128) {
    keep_registers<24>();
#if MLAC_FP8
    if (threadIdx.x == 0) load_cache(p, shared, full, empty);
#else
    if (threadIdx.x == 0) load_cache(p, &cache_map, shared, full, empty);
#endif
    if (threadIdx.x == 32) load_queries(p, &query_map, shared, query_full, query_empty);
    if (threadIdx.x == 64) let_next_kernel_start();
  } else {
    take_registers<240>();
    compute(p, memory, shared, full, empty, query_full, query_empty);
  }
}
