// The dense product for sm_90a. 384 threads: one warpgroup loads by TMA, two multiply 64 x 256 each of a tile of 128 x 256, 64 deep a stage.
// A CTA takes every gridDim.x-th tile; the next tile's stages are loaded while this one's numbers are stored.
#pragma once
#include "hopper.cuh"
#include "matmul.cuh"

constexpr int kSubTile = 64 * 128;  // bytes of 64 rows, 64 deep
constexpr int kRowBoxes = kRows / 64, kColumnBoxes = kColumns / 64;
constexpr int kStageBytes = (kRowBoxes + kColumnBoxes) * kSubTile;
constexpr int kBarrierAt = kStages * kStageBytes;
constexpr int kSharedBytes = kBarrierAt + 8 * 2 * kStages;

static_assert(kRows == 128 && kColumns == 256 && kDepth == 64, "two warpgroups, a wgmma's columns, the swizzle's row");

MLAC_DEVICE void load_tiles(const MatmulParams& p, const TensorMap* a_map, const TensorMap* b_map, u32 shared, u32 full, u32 empty) {
  const int row_tiles = p.rows / kRows, column_tiles = p.columns / kColumns;
  int count = 0;
  for (int tile = blockIdx.x; tile < row_tiles * column_tiles; tile += gridDim.x) {
    const TilePlace place = place_of(tile, row_tiles, column_tiles);
    for (int at = 0; at < p.depth; at += kDepth, ++count) {
      const int stage = count % kStages;
      const u32 to = shared + stage * kStageBytes, barrier = full + 8 * stage;
      barrier_wait(empty + 8 * stage, (count / kStages & 1) ^ 1);
      barrier_expect(barrier, kStageBytes);
#pragma unroll
      for (int i = 0; i < kRowBoxes; ++i) tma_load(to + i * kSubTile, a_map, at, place.row * kRows + i * 64, 0, barrier);
#pragma unroll
      for (int i = 0; i < kColumnBoxes; ++i)
        tma_load(to + (kRowBoxes + i) * kSubTile, b_map, at, place.column * kColumns + i * 64, 0, barrier);
    }
  }
}

MLAC_DEVICE void multiply_tiles(const MatmulParams& p, u32 shared, u32 full, u32 empty) {
  const int group = __shfl_sync(~0u, threadIdx.x / 128 - 1, 0);  // 0 or 1, known to be uniform
  const int thread = threadIdx.x % 128;
  const int warp = thread / 32, lane = thread % 32;
  const int row_tiles = p.rows / kRows, column_tiles = p.columns / kColumns;
  int count = 0;
  for (int tile = blockIdx.x; tile < row_tiles * column_tiles; tile += gridDim.x) {
    float d[kColumns / 2];
    pin(d);
    for (int at = 0; at < p.depth; at += kDepth, ++count) {
      const int stage = count % kStages;
      const u32 a = shared + stage * kStageBytes + group * kSubTile;
      const u32 b = shared + stage * kStageBytes + kRowBoxes * kSubTile;
      barrier_wait(full + 8 * stage, count / kStages & 1);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kDepth / 16; ++k)
        wgmma_scores(d, descriptor(kDescriptorK, a + k * 32), descriptor(kDescriptorK, b + k * 32), at + k > 0);
      wgmma_commit();
      // The stage before is multiplied, this one is being.
      wgmma_wait<1>();
      if (at > 0 && lane == 0) barrier_arrive(empty + 8 * ((count - 1) % kStages));
    }
    wgmma_wait<0>();
    pin(d);
    if (lane == 0) barrier_arrive(empty + 8 * ((count - 1) % kStages));
    const TilePlace place = place_of(tile, row_tiles, column_tiles);
    const int row = place.row * kRows + group * 64 + warp * 16 + lane / 4;
    const int column = place.column * kColumns + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j) {
      store_pair(p, row, column + j * 8, d[4 * j], d[4 * j + 1]);
      store_pair(p, row + 8, column + j * 8, d[4 * j + 2], d[4 * j + 3]);
    }
  }
}

MLAC_KERNEL __launch_bounds__(384, 1)
mlac_matmul(const __grid_constant__ MatmulParams p, const __grid_constant__ TensorMap a_map, const __grid_constant__ TensorMap b_map) {
  MLAC_DYNAMIC_SHARED(memory);
  const u32 shared = shared_address(memory);
  const u32 full = shared + kBarrierAt, empty = full + 8 * kStages;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(full + 8 * i, 1);
      barrier_init(empty + 8 * i, 8);
    }
    fence_barrier_init();
    tma_prefetch_map(&a_map);
    tma_prefetch_map(&b_map);
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    keep_registers<24>();
    if (threadIdx.x == 0) load_tiles(p, &a_map, &b_map, shared, full, empty);
  } else {
    take_registers<240>();
    multiply_tiles(p, shared, full, empty);
  }
}
