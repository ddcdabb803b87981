// The dense product with mma.sync, for sm_80, 86, 89 and 120. Eight warps, 64 x 32 each of a tile of 128 x 128, 32 deep a stage.
// Rows in shared memory are 16 bytes longer than the data: eight rows of a column fall into eight different bank groups.
#pragma once
#include "matmul.cuh"
#include "mma.cuh"

constexpr int kThreads = 256;
constexpr int kPitch = (kDepth + 8) * 2;  // bytes
constexpr int kStageBytes = (kRows + kColumns) * kPitch;
constexpr int kSharedBytes = kStages * kStageBytes;

static_assert(kRows == 128 && kColumns == 128 && kDepth % 16 == 0 && kStages >= 2, "eight warps of 64 x 32");

MLAC_DEVICE void load_stage(const MatmulParams& p, const TilePlace& place, u32 stage, int at) {
  constexpr int kChunks = kDepth / 8;  // of 16 bytes in a row
#pragma unroll
  for (int i = threadIdx.x; i < (kRows + kColumns) * kChunks; i += kThreads) {
    const int row = i / kChunks, chunk = i % kChunks;
    const u16* from = row < kRows ? p.a + (size_t)(place.row * kRows + row) * p.depth
                                  : p.b + (size_t)(place.column * kColumns + row - kRows) * p.depth;
    copy_async(stage + row * kPitch + chunk * 16, from + at + chunk * 8, true);
  }
}

MLAC_KERNEL __launch_bounds__(kThreads, 1) mlac_matmul(const __grid_constant__ MatmulParams p) {
  MLAC_DYNAMIC_SHARED(memory);
  const u32 shared = shared_address(memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_row = warp / 4 * 64, warp_column = warp % 4 * 32;
  // Where this lane's rows of an ldmatrix begin.
  const u32 a_at = shared + (warp_row + lane % 16) * kPitch + lane / 16 * 16;
  const u32 b_at = shared + (kRows + warp_column + lane / 16 * 8 + lane % 8) * kPitch + lane / 8 % 2 * 16;
  const int row_tiles = p.rows / kRows, column_tiles = p.columns / kColumns, steps = p.depth / kDepth;
  for (int tile = blockIdx.x; tile < row_tiles * column_tiles; tile += gridDim.x) {
    const TilePlace place = place_of(tile, row_tiles, column_tiles);
    float d[4][4][4] = {};
#pragma unroll
    for (int s = 0; s < kStages - 1; ++s) {
      if (s < steps) load_stage(p, place, shared + s * kStageBytes, s * kDepth);
      copy_commit();
    }
    for (int step = 0; step < steps; ++step) {
      copy_wait<kStages - 2>();
      __syncthreads();
      // The stage that was multiplied in the turn before is free.
      const int next = step + kStages - 1;
      if (next < steps) load_stage(p, place, shared + next % kStages * kStageBytes, next * kDepth);
      copy_commit();
      const u32 stage = step % kStages * kStageBytes;
#pragma unroll
      for (int k = 0; k < kDepth / 16; ++k) {
        u32 a[4][4], b[2][4];
#pragma unroll
        for (int i = 0; i < 4; ++i) load_4(a[i], a_at + stage + i * 16 * kPitch + k * 32);
#pragma unroll
        for (int j = 0; j < 2; ++j) load_4(b[j], b_at + stage + j * 16 * kPitch + k * 32);
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int j = 0; j < 4; ++j) multiply(d[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
      }
    }
    // Nobody loads the next tile over what somebody still multiplies.
    __syncthreads();
    const int row = place.row * kRows + warp_row + lane / 4;
    const int column = place.column * kColumns + warp_column + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        store_pair(p, row + i * 16, column + j * 8, d[i][j][0], d[i][j][1]);
        store_pair(p, row + i * 16 + 8, column + j * 8, d[i][j][2], d[i][j][3]);
      }
  }
}
