// K7, second half: adds the pieces of split units in a fixed order and joins the sink, once.
#pragma once
#include "common.cuh"

constexpr int kCombineWarps = 8;
constexpr int kOutDim = kGqa ? kHeadDim : kRank;
constexpr int kUnitRows = kGqa ? kHeads * kQueryTokens : kHeadTile * kGroup;
constexpr int kMaxParts = 1024;

// One CTA for one row (a head of a query token). Warp w adds pieces w, w + 8, ...; then the warps' sums are added in order.
MLAC_KERNEL __launch_bounds__(kCombineWarps * 32) mlac_combine(const __grid_constant__ DecodeParams p) {
  __shared__ float weights[kMaxParts];
  __shared__ int slots[kMaxParts];
  __shared__ float sums[kCombineWarps][kOutDim];
  __shared__ int pieces_shared;
  wait_for_previous_kernel();

  const int head = blockIdx.x % kAllHeads;
  const int token = blockIdx.x / kAllHeads % kQueryTokens;
  const int request = blockIdx.x / (kAllHeads * kQueryTokens);
  int unit, row;
  if (kGqa) {
    unit = head / kHeads;
    row = token * kHeads + head % kHeads;
  } else {
    int row_tile = token * kHeadTiles + head / kHeadTile;
    unit = row_tile / kGroup;
    row = row_tile % kGroup * kHeadTile + head % kHeadTile;
  }
  const int u = request * kUnits + unit;
  const int first = p.owners[2 * u], last = p.owners[2 * u + 1];
  if (first == last) return;  // whole: the decode kernel wrote it

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (warp == 0) {
    int pieces = 0;
    for (int base = first; base <= last; base += 32) {
      int part = base + lane;
      bool filled = false;
      int slot = 0;
      if (part <= last) {
        const int* bound = p.bounds + 2 * part;
        filled = bound[0] != bound[2] || bound[1] != bound[3];
        slot = 2 * part + (bound[0] == u ? 0 : 1);
      }
      u32 votes = __ballot_sync(~0u, filled);
      if (filled) slots[pieces + __popc(votes & ((1u << lane) - 1))] = slot;
      pieces += __popc(votes);
    }
    __syncwarp();
    float peak = minus_infinity();
    for (int i = lane; i < pieces; i += 32) {
      float lse = p.lse_part[(size_t)slots[i] * kUnitRows + row];
      weights[i] = lse;
      peak = fmaxf(peak, lse);
    }
    for (int step = 16; step > 0; step /= 2) peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, step));
    float base = peak == minus_infinity() ? 0.0f : peak;
    float sum = 0.0f;
    for (int i = lane; i < pieces; i += 32) {
      float weight = exp2_fast(weights[i] - base);
      weights[i] = weight;
      sum += weight;
    }
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    float denominator = sum;
    if (kSinks) denominator += exp2_fast(p.sinks[head] * kLog2e - base);
    float inverse = sum > 0.0f ? reciprocal(denominator) : 0.0f;
    for (int i = lane; i < pieces; i += 32) weights[i] *= inverse;
    if (lane == 0) {
      size_t at = ((size_t)request * kQueryTokens + token) * kAllHeads + head;
      p.lse[at] = sum > 0.0f ? (base + log2_fast(sum)) * kLn2 : minus_infinity();
      pieces_shared = pieces;
    }
  }
  __syncthreads();
  const int pieces = pieces_shared;

  for (int c = 2 * lane; c < kOutDim; c += 64) {
    float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll 4
    for (int i = warp; i < pieces; i += kCombineWarps) {
      const float2 part = *reinterpret_cast<const float2*>(p.out_part + ((size_t)slots[i] * kUnitRows + row) * kOutDim + c);
      sum.x += weights[i] * part.x;
      sum.y += weights[i] * part.y;
    }
    sums[warp][c] = sum.x;
    sums[warp][c + 1] = sum.y;
  }
  __syncthreads();
  u32* out = static_cast<u32*>(p.out) + (((size_t)request * kQueryTokens + token) * kAllHeads + head) * (kOutDim / 2);
  for (int c = 2 * threadIdx.x; c < kOutDim; c += 2 * kCombineWarps * 32) {
    float x = 0.0f, y = 0.0f;
    for (int w = 0; w < kCombineWarps; ++w) {
      x += sums[w][c];
      y += sums[w][c + 1];
    }
    out[c / 2] = pack(x, y);
  }
}
