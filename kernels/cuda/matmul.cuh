// A dense product, the yardstick beside which gpu-check puts the attention kernels: out = a * transposed b, bf16, sums in f32.
// Both files that include this compute whole tiles only, and walk them in the same order.
#pragma once
#include "ptx.cuh"

// Mirrored by `params::MatmulParams` in Rust, field by field.
struct MatmulParams {
  const u16* a;    // [rows, depth]
  const u16* b;    // [columns, depth]
  u16* out;        // [rows, columns]
  int rows;
  int columns;
  int depth;
};

// Row and column of a tile, in tiles. Sixteen row tiles go through all columns together: the CTAs that run side by side
// share rows of `a` and of `b`, and find them in the L2 cache.
struct TilePlace {
  int row;
  int column;
};

MLAC_DEVICE TilePlace place_of(int tile, int row_tiles, int column_tiles) {
  constexpr int kTogether = 16;
  const int first = tile / (kTogether * column_tiles) * kTogether;
  const int together = min(kTogether, row_tiles - first);
  const int inside = tile - first * column_tiles;
  return {first + inside % together, inside / together};
}

// Two neighbours of a row.
MLAC_DEVICE void store_pair(const MatmulParams& p, int row, int column, float x, float y) {
  *reinterpret_cast<u32*>(p.out + (size_t)row * p.columns + column) = pack(x, y);
}
