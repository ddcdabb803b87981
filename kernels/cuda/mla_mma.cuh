// MLA decode with mma.sync, for sm_80, 86, 89 and 120 and for latent ranks beyond K1's: rank 64 to 512.
//
// kRowGroups x kColumnGroups warps. Row group g holds 16 heads. Its kColumnGroups warps divide a tile's tokens among them for the
// scores, exchange row maxima and weights through shared memory, and divide the latent's columns for the output.
// Rows in shared memory are 16 bytes longer than the data: eight rows of a column fall into eight different bank groups.
//
// An FP8 cache's tiles come as they lie in the cache, and become f16 in the one tile that is multiplied. `sm90_fp8.cuh` says what
// the factors of the tokens do to scores, maxima and weights.
#pragma once
#include "common.cuh"
#include "mma.cuh"
#if MLAC_FP8
#include "fp8.cuh"
#endif

constexpr int kRow = kRank + kRope;
constexpr int kPitch = (kRow + 8) * 2;         // bytes
constexpr int kWeightPitch = (kTile + 8) * 2;  // bytes
constexpr int kRowGroups = kHeadTile / 16;
constexpr int kWarps = kRowGroups * kColumnGroups;
constexpr int kThreads = kWarps * 32;
constexpr int kTileTokens = kTile / kColumnGroups;  // of a warp, for the scores
constexpr int kColumns = kRank / kColumnGroups;     // of a warp, for the output
constexpr int kScoreBlocks = kTileTokens / 8;
constexpr int kOutBlocks = kColumns / 8;

constexpr int kTileBytes = kTile * kPitch;
constexpr int kTileAt = kHeadTile * kPitch;  // the stages, or the one tile of f16
#if MLAC_FP8
constexpr int kFactorsAt = kTileAt + kTileBytes;  // float2 [kTile]: scale and its logarithm
constexpr int kStageAt = kFactorsAt + kTile * 8;
constexpr int kStageBytes = kTile * (kRank + kRope * 2 + 4);  // codes, keys, scales of the tile's tokens
constexpr int kStageKeysAt = kTile * kRank, kStageScalesAt = kStageKeysAt + kTile * kRope * 2;
#else
constexpr int kStageAt = kTileAt;
constexpr int kStageBytes = kTileBytes;
#endif
constexpr int kWeightAt = kStageAt + kStages * kStageBytes;
constexpr int kPeakAt = kWeightAt + kHeadTile * kWeightPitch;
constexpr int kSharedBytes = kPeakAt + kWarps * 16 * 4;

static_assert(kGroup == 1 && kPage % kTile == 0 && kTile % 16 == 0, "a tile lies in one page");
static_assert(kTileTokens % 8 == 0 && kColumns % 16 == 0 && kRow % 16 == 0, "whole fragments");
static_assert(kWarps <= 8 && kStages >= 2, "256 threads have 255 registers each");

// All warps of a row group.
MLAC_DEVICE void group_barrier(int group) {
  if (kRowGroups == 1) __syncthreads();
  else if (group == 0) named_barrier<1, kColumnGroups * 32>();
  else if (group == 1) named_barrier<2, kColumnGroups * 32>();
  else if (group == 2) named_barrier<3, kColumnGroups * 32>();
  else named_barrier<4, kColumnGroups * 32>();
}

#if MLAC_FP8
// Rows of `bytes` each, one behind the other in both places; those beyond `valid` become zeros.
MLAC_DEVICE void load_plane(u32 to, const u8* from, int bytes, int valid) {
  for (int i = threadIdx.x; i < kTile * bytes / 16; i += kThreads) copy_async(to + i * 16, from + i * 16, i * 16 < valid * bytes);
}

MLAC_DEVICE void load_tile(const DecodeParams& p, const Piece& piece, const int* pages, u32 stage, int tile) {
  const int start = tile * kTile, row = start % kPage, valid = max(0, min(kTile, piece.length - start));
  const u8* page = static_cast<const u8*>(p.cache) + (size_t)pages[start / kPage] * kPageBytes;
  load_plane(stage, page + row * kRank, kRank, valid);
  load_plane(stage + kStageKeysAt, page + kKeysAt + row * kRope * 2, kRope * 2, valid);
  load_plane(stage + kStageScalesAt, page + kScalesAt + row * 4, 4, valid);
}

// A stage becomes the tile that is multiplied.
MLAC_DEVICE void convert_tile(u8* memory, int stage, int valid) {
  const u8* from = memory + kStageAt + stage * kStageBytes;
  for (int i = threadIdx.x; i < kTile * kRank / 8; i += kThreads) {
    const int token = i / (kRank / 8), chunk = i % (kRank / 8);
    *reinterpret_cast<uint4*>(memory + kTileAt + token * kPitch + chunk * 16) = widen_8(reinterpret_cast<const uint2*>(from)[i]);
  }
  for (int i = threadIdx.x; i < kTile * kRope / 8; i += kThreads) {
    const int token = i / (kRope / 8), chunk = i % (kRope / 8);
    *reinterpret_cast<uint4*>(memory + kTileAt + token * kPitch + kRank * 2 + chunk * 16) =
        reinterpret_cast<const uint4*>(from + kStageKeysAt)[i];
  }
  if ((int)threadIdx.x < kTile)
    put_factor(memory + kFactorsAt, threadIdx.x, reinterpret_cast<const float*>(from + kStageScalesAt)[threadIdx.x],
               (int)threadIdx.x < valid);
}

// bf16 queries become f16, in place: beyond 65504 they become infinite, and the output NaN.
MLAC_DEVICE void convert_queries(u8* memory) {
#if !MLAC_F16
  for (int i = threadIdx.x; i < kHeadTile * (kRow / 8); i += kThreads) {
    uint4* at = reinterpret_cast<uint4*>(memory + i / (kRow / 8) * kPitch + i % (kRow / 8) * 16);
    const uint4 x = *at;
    *at = make_uint4(bf16_to_f16(x.x), bf16_to_f16(x.y), bf16_to_f16(x.z), bf16_to_f16(x.w));
  }
#endif
}
#else
MLAC_DEVICE void load_tile(const DecodeParams& p, const Piece& piece, const int* pages, u32 stage, int tile) {
  const int start = tile * kTile;
  const u8* page = static_cast<const u8*>(p.cache) + ((size_t)pages[start / kPage] * kPage + start % kPage) * (kRow * 2);
  for (int i = threadIdx.x; i < kTile * (kRow / 8); i += kThreads) {
    int token = i / (kRow / 8), chunk = i % (kRow / 8);
    copy_async(stage + token * kPitch + chunk * 16, page + token * (kRow * 2) + chunk * 16, start + token < piece.length);
  }
}
#endif

MLAC_KERNEL __launch_bounds__(kThreads, 1) mlac_decode(const __grid_constant__ DecodeParams p) {
  MLAC_DYNAMIC_SHARED(memory);
  const u32 shared = shared_address(memory);
  float* peaks = reinterpret_cast<float*>(memory + kPeakAt);
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const int group = warp / kColumnGroups, part = warp % kColumnGroups;
  const int row = lane / 4, column = lane % 4 * 2;
  const float scale = p.scale * kLog2e;
  const float peak_scale = kFp8 ? 1.0f : scale;  // of the running maxima
  wait_for_previous_kernel();
  let_next_kernel_start();

  // Where this lane's row of an ldmatrix begins.
  const u32 query_at = shared + (group * 16 + lane % 16) * kPitch + lane / 16 * 16;
  const u32 key_at = shared + kTileAt + (part * kTileTokens + lane % 8) * kPitch + lane / 8 % 2 * 16;
  const u32 value_at = shared + kTileAt + lane % 16 * kPitch + lane / 16 * 16 + part * kColumns * 2;
  const u32 weight_at = shared + kWeightAt + (group * 16 + lane % 16) * kWeightPitch + lane / 16 * 16;

  Walk walk(p);
  Piece piece;
  while (walk.next(p, piece)) {
    const int token = piece.unit / kHeadTiles;
    const int head_tile = piece.unit % kHeadTiles * kHeadTile;
    const View view = view_of(piece.length, token, kMask == 2 ? p.tree[piece.request * kQueryTokens + token] : 0);
    const int* pages = p.pages + (size_t)piece.request * p.page_stride;
    const int count = piece.end - piece.begin;

    const u8* queries = static_cast<const u8*>(p.q) +
                        (((size_t)piece.request * kQueryTokens + token) * kHeads + head_tile) * (kRow * 2);
    for (int i = threadIdx.x; i < kHeadTile * (kRow / 8); i += kThreads) {
      int r = i / (kRow / 8), chunk = i % (kRow / 8);
      bool valid = head_tile + r < kHeads;
      copy_async(shared + r * kPitch + chunk * 16, queries + (valid ? r * (kRow * 2) + chunk * 16 : 0), valid);
    }
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) {
      if (i < count) load_tile(p, piece, pages, shared + kStageAt + i * kStageBytes, piece.begin + i);
      copy_commit();
    }

    float o[kOutBlocks][4];
#pragma unroll
    for (int i = 0; i < kOutBlocks; ++i) o[i][0] = o[i][1] = o[i][2] = o[i][3] = 0.0f;
    float peak[2] = {minus_infinity(), minus_infinity()};
    float sum[2] = {0.0f, 0.0f};

    for (int i = 0; i < count; ++i) {
      copy_wait<kStages - 2>();
      __syncthreads();  // the tile is there for all, and the stage before is read by none
      if (i + kStages - 1 < count)
        load_tile(p, piece, pages, shared + kStageAt + (i + kStages - 1) % kStages * kStageBytes, piece.begin + i + kStages - 1);
      copy_commit();
      const int start = (piece.begin + i) * kTile;
#if MLAC_FP8
      const u32 stage = 0;
      convert_tile(memory, i % kStages, piece.length - start);
      if (i == 0) convert_queries(memory);
      __syncthreads();
#else
      const u32 stage = i % kStages * kStageBytes;
#endif

      float s[kScoreBlocks][4];
#pragma unroll
      for (int b = 0; b < kScoreBlocks; ++b) s[b][0] = s[b][1] = s[b][2] = s[b][3] = 0.0f;
#pragma unroll 4
      for (int k = 0; k < kRow / 16; ++k) {
        u32 a[4];
        load_4(a, query_at + k * 32);
#pragma unroll
        for (int b = 0; b < kScoreBlocks; ++b) {
          u32 keys[2];
          load_2(keys, key_at + stage + b * 8 * kPitch + k * 32);
          multiply(s[b], a, keys[0], keys[1]);
        }
      }
      if (!view.whole(start)) {
#pragma unroll
        for (int b = 0; b < kScoreBlocks; ++b)
#pragma unroll
          for (int j = 0; j < 4; ++j)
            if (!view.sees(start + part * kTileTokens + b * 8 + column + j % 2)) s[b][j] = minus_infinity();
      }

#if MLAC_FP8
      // Scale and its logarithm of two neighbouring tokens.
      const float4* factors = reinterpret_cast<const float4*>(memory + kFactorsAt + part * kTileTokens * 8) + column / 2;
#pragma unroll
      for (int b = 0; b < kScoreBlocks; ++b)
#pragma unroll
        for (int j = 0; j < 4; ++j) s[b][j] *= (j % 2 ? factors[b * 4].z : factors[b * 4].x) * scale;
#endif
      float top[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        top[r] = minus_infinity();
#pragma unroll
        for (int b = 0; b < kScoreBlocks; ++b) {
#if MLAC_FP8
          top[r] = fmaxf(top[r], fmaxf(s[b][2 * r] + factors[b * 4].y, s[b][2 * r + 1] + factors[b * 4].w));
#else
          top[r] = fmaxf(top[r], fmaxf(s[b][2 * r], s[b][2 * r + 1]));
#endif
        }
        top[r] = fmaxf(top[r], __shfl_xor_sync(~0u, top[r], 1));
        top[r] = fmaxf(top[r], __shfl_xor_sync(~0u, top[r], 2));
        if (lane % 4 == 0) peaks[warp * 16 + row + 8 * r] = top[r];
      }
      group_barrier(group);
      float rescale[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float all = peak[r];
#pragma unroll
        for (int c = 0; c < kColumnGroups; ++c) all = fmaxf(all, peaks[(group * kColumnGroups + c) * 16 + row + 8 * r]);
        float anchor = all == minus_infinity() ? 0.0f : all * peak_scale;
        rescale[r] = exp2_fast(peak[r] * peak_scale - anchor);
        peak[r] = all;
        float added = 0.0f;
#pragma unroll
        for (int b = 0; b < kScoreBlocks; ++b) {
          float x = exp2_fast(s[b][2 * r] * peak_scale - anchor), y = exp2_fast(s[b][2 * r + 1] * peak_scale - anchor);
          added += x + y;
#if MLAC_FP8
          x *= factors[b * 4].x;
          y *= factors[b * 4].z;
#endif
          int at = (group * 16 + row + 8 * r) * kWeightPitch + (part * kTileTokens + b * 8 + column) * 2;
          *reinterpret_cast<u32*>(memory + kWeightAt + at) = pack_weights(x, y);
        }
        sum[r] = sum[r] * rescale[r] + added;  // of this warp's tokens
      }
#pragma unroll
      for (int b = 0; b < kOutBlocks; ++b)
#pragma unroll
        for (int j = 0; j < 4; ++j) o[b][j] *= rescale[j / 2];
      group_barrier(group);

#pragma unroll
      for (int k = 0; k < kTile / 16; ++k) {
        u32 a[4];
        load_4(a, weight_at + k * 32);
#pragma unroll
        for (int b = 0; b < kOutBlocks; b += 2) {
          u32 values[4];
          load_4_transposed(values, value_at + stage + k * 16 * kPitch + b * 16);
          multiply(o[b], a, values[0], values[1]);
          multiply(o[b + 1], a, values[2], values[3]);
        }
      }
    }

    // The warps' shares of the denominators, added in order.
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[r] += __shfl_xor_sync(~0u, sum[r], 1);
      sum[r] += __shfl_xor_sync(~0u, sum[r], 2);
    }
    copy_wait<0>();
    __syncthreads();
    if (lane % 4 == 0) {
      peaks[warp * 16 + row] = sum[0];
      peaks[warp * 16 + row + 8] = sum[1];
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float all = 0.0f;
#pragma unroll
      for (int c = 0; c < kColumnGroups; ++c) all += peaks[(group * kColumnGroups + c) * 16 + row + 8 * r];
      const int in_tile = group * 16 + row + 8 * r;
      const int head = head_tile + in_tile;
      const float anchor = peak[r] == minus_infinity() ? 0.0f : peak[r] * peak_scale;
      const float lse = all > 0.0f ? anchor + log2_fast(all) : minus_infinity();
      const bool store = part == 0 && lane % 4 == 0;
      float denominator = all;
      if (piece.slot >= 0) {
        if (store) p.lse_part[(size_t)piece.slot * kHeadTile + in_tile] = lse;
      } else if (head < kHeads) {
        if (kSinks) denominator += exp2_fast(p.sinks[head] * kLog2e - anchor);
        if (store) p.lse[((size_t)piece.request * kQueryTokens + token) * kHeads + head] = lse * kLn2;
      }
      const float inverse = all > 0.0f ? reciprocal(denominator) : 0.0f;
      if (piece.slot >= 0) {
        float* out = p.out_part + ((size_t)piece.slot * kHeadTile + in_tile) * kRank + part * kColumns + column;
#pragma unroll
        for (int b = 0; b < kOutBlocks; ++b)
          *reinterpret_cast<float2*>(out + b * 8) = make_float2(o[b][2 * r] * inverse, o[b][2 * r + 1] * inverse);
      } else if (head < kHeads) {
        u16* out = static_cast<u16*>(p.out) + (((size_t)piece.request * kQueryTokens + token) * kHeads + head) * kRank +
                   part * kColumns + column;
#pragma unroll
        for (int b = 0; b < kOutBlocks; ++b)
          *reinterpret_cast<u32*>(out + b * 8) = pack(o[b][2 * r] * inverse, o[b][2 * r + 1] * inverse);
      }
    }
    __syncthreads();  // peaks and queries are free for the next piece
  }
}
