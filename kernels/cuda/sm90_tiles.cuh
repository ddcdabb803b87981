// Tiles of a 16-bit cache for `mla_sm90.cuh`: TMA puts them where wgmma reads them.
#pragma once
#include "sm90_load.cuh"

constexpr int kTileAt = kStageAt;
constexpr int kMergeAt = kStageAt + kStages * kStageBytes;  // float [2][64][2]
// With two stages, waiting for the next tile before the values of this one would leave nothing to do while it comes.
constexpr bool kOverlap = kStages > 2;

MLAC_DEVICE void load_cache(const DecodeParams& p, const TensorMap* map, u32 shared, u32 full, u32 empty) {
  fill_ring(p, full, empty, kStageBytes, [=](const Piece&, int page, int stage, u32 barrier) {
#pragma unroll
    for (int c = 0; c < kRowTiles64; ++c)
      tma_load(shared + kStageAt + stage * kStageBytes + c * kSubTile, map, c * 64, 0, page, barrier);
  });
}

MLAC_DEVICE int tile_slot(int count, int) { return count % kStages; }

// Factor of the running maxima: here they are of the scores as they were multiplied.
MLAC_DEVICE float peak_scale(const DecodeParams& p) { return p.scale * kLog2e; }

// Waits for a tile. The last page's rows beyond the request may hold anything: as values they would meet weights of zero,
// and 0 * NaN is NaN. They become zeros; when two warpgroups share the tile, both write the same ones.
MLAC_DEVICE void await_tile(const Ring& ring, int stage, int count, const Piece& piece, int i) {
  barrier_wait(ring.full + 8 * stage, count / kStages & 1);
  const int start = (piece.begin + i) * kTile;
  if (start + kTile > piece.length) {
    u8* bytes = ring.memory + kStageAt + stage * kStageBytes;
    for (int r = piece.length - start + ring.warp; r < kTile; r += 4)
#pragma unroll
      for (int c = 0; c < kLatentTiles; ++c) *reinterpret_cast<u32*>(bytes + c * kSubTile + r * 128 + ring.lane * 4) = 0;
    fence_async_proxy();
    warpgroup_barrier(ring.group);
  }
}

MLAC_DEVICE void release_tile(const Ring& ring, int stage) {
  if (ring.lane == 0) barrier_arrive(ring.empty + 8 * stage);
}

// The largest of this thread's scores, row by row.
MLAC_DEVICE void tops(float (&s)[kScoreRegisters], const Ring&, int, int, float, float (&top)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    top[r] = s[2 * r];
#pragma unroll
    for (int j = 0; j < kScoreRegisters; j += 4) top[r] = fmaxf(top[r], fmaxf(s[j + 2 * r], s[j + 2 * r + 1]));
  }
}

// Weights in place of the scores; `top` is of the row's tokens in this tile.
MLAC_DEVICE void weigh(float (&s)[kScoreRegisters], const Ring&, int, int, float scale, const float (&top)[2], float (&peak)[2],
                       float (&sum)[2], float (&rescale)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float all = fmaxf(top[r], peak[r]);
    float anchor = all == minus_infinity() ? 0.0f : all * scale;
    rescale[r] = exp2_fast(peak[r] * scale - anchor);
    peak[r] = all;
    float added = 0.0f;
#pragma unroll
    for (int j = 0; j < kScoreRegisters; j += 4) {
      s[j + 2 * r] = exp2_fast(s[j + 2 * r] * scale - anchor);
      s[j + 2 * r + 1] = exp2_fast(s[j + 2 * r + 1] * scale - anchor);
      added += s[j + 2 * r] + s[j + 2 * r + 1];
    }
    sum[r] = sum[r] * rescale[r] + added;
  }
}

MLAC_DEVICE void prepare_queries(const Ring&) {}
