// The end of a piece in `mla_sm90.cuh`: halves of a warpgroup's columns exchanged, added, scaled, stored.
#pragma once
#include "common.cuh"
#include "hopper.cuh"

// Writes a half of this thread's columns where `out` starts; rows that are no heads are left out.
template <int Half, bool Final>
MLAC_DEVICE void store_half(const float (&o)[kOutRegisters], void* out, int row, int rows, int column) {
#pragma unroll
  for (int i = Half * kOutRegisters / 2; i < (Half + 1) * kOutRegisters / 2; i += 4) {
    int c = i * 2 + column;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (row + 8 * r >= rows) continue;
      size_t at = (size_t)(row + 8 * r) * kRank + c;
      if (Final) static_cast<u32*>(out)[at / 2] = pack(o[i + 2 * r], o[i + 2 * r + 1]);
      else static_cast<float2*>(out)[at / 2] = make_float2(o[i + 2 * r], o[i + 2 * r + 1]);
    }
  }
}

template <int Half>
MLAC_DEVICE void put_half(const float (&o)[kOutRegisters], float* exchange, int thread) {
#pragma unroll
  for (int i = 0; i < kOutRegisters / 2; ++i) exchange[i * 128 + thread] = o[Half * kOutRegisters / 2 + i];
}

// o = scale_own * o + scale_other * other, always warpgroup 0's term first.
template <int Half, bool OwnFirst>
MLAC_DEVICE void add_half(float (&o)[kOutRegisters], const float* exchange, int thread, const float (&own)[2],
                          const float (&other)[2]) {
#pragma unroll
  for (int i = 0; i < kOutRegisters / 2; ++i) {
    int r = i / 2 % 2;
    float mine = o[Half * kOutRegisters / 2 + i] * own[r];
    float theirs = exchange[i * 128 + thread] * other[r];
    o[Half * kOutRegisters / 2 + i] = OwnFirst ? mine + theirs : theirs + mine;
  }
}

// Scales this warpgroup's columns by the inverse denominators and stores them.
template <int Half>
MLAC_DEVICE void finish_half(float (&o)[kOutRegisters], const DecodeParams& p, const Piece& piece, int row_tile, int slot_row,
                             const float (&inverse)[2], int row, int column) {
#pragma unroll
  for (int i = Half * kOutRegisters / 2; i < (Half + 1) * kOutRegisters / 2; ++i) o[i] *= inverse[i / 2 % 2];
  if (piece.slot >= 0) {
    store_half<Half, false>(o, p.out_part + (size_t)slot_row * kRank, row, 64, column);
  } else {
    int head = row_tile % kHeadTiles * 64;
    size_t first = ((size_t)piece.request * kQueryTokens + row_tile / kHeadTiles) * kHeads + head;
    store_half<Half, true>(o, static_cast<u16*>(p.out) + first * kRank, row, kHeads - head, column);
  }
}

// The inverse denominators of this thread's two rows; their LSE is stored by one thread of the four that share a row.
MLAC_DEVICE void denominators(const DecodeParams& p, const Piece& piece, int row_tile, int slot_row, const float (&peak)[2],
                              const float (&sum)[2], int row, bool store, float (&inverse)[2]) {
  const float scale = peak_scale(p);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    int head = row_tile % kHeadTiles * 64 + row + 8 * r;
    float top = peak[r] == minus_infinity() ? 0.0f : peak[r] * scale;
    float denominator = sum[r];
    float lse = sum[r] > 0.0f ? top + log2_fast(sum[r]) : minus_infinity();
    if (piece.slot >= 0) {
      if (store) p.lse_part[slot_row + row + 8 * r] = lse;
    } else if (head < kHeads) {
      if (kSinks) denominator += exp2_fast(p.sinks[head] * kLog2e - top);
      size_t at = ((size_t)piece.request * kQueryTokens + row_tile / kHeadTiles) * kHeads + head;
      if (store) p.lse[at] = lse * kLn2;
    }
    inverse[r] = sum[r] > 0.0f ? reciprocal(denominator) : 0.0f;
  }
}
