// The loading side of the ring on sm_90a: one thread walks the CTA's pieces by itself, ahead of those who compute.
#pragma once
#include "common.cuh"
#include "hopper.cuh"

// Every tile of this CTA's pieces, each into the next stage when it is free. `load(piece, page, stage, full)` asks for `bytes` bytes.
template <typename Load>
MLAC_DEVICE void fill_ring(const DecodeParams& p, u32 full, u32 empty, int bytes, Load load) {
  Walk walk(p);
  Piece piece;
  int count = 0;
  while (walk.next(p, piece)) {
    const int* pages = p.pages + (size_t)piece.request * p.page_stride;
    for (int tile = piece.begin; tile < piece.end; ++tile, ++count) {
      int stage = count % kStages;
      int page = pages[tile];
      barrier_wait(empty + 8 * stage, (count / kStages & 1) ^ 1);
      barrier_expect(full + 8 * stage, bytes);
      load(piece, page, stage, full + 8 * stage);
    }
  }
}
