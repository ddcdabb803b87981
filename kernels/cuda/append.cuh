// K8: appends rows to the latent cache: the latent as it is, the key rotated by a table of cosines and sines.
//
// Half-split pairs: component l turns with l + kRope / 2. The table holds whatever scaling of frequencies and of attention
// (YaRN) the model has. One warp a token.
#pragma once
#include "common.cuh"

// Mirrored by `params::AppendParams`.
struct AppendParams {
  const void* latent;     // [tokens, kRank]
  const void* key;        // [tokens, kRope], not rotated
  const float* cosines;   // [table_rows, kRope / 2]
  const float* sines;     // [table_rows, kRope / 2]
  const int* positions;   // [tokens]
  const int* slots;       // [tokens]: page * kPage + row, negative: none
  void* cache;            // [pages, kPage, kRank + kRope]
  int tokens;
  int table_rows;
  int cache_rows;
};

constexpr int kAppendWarps = 4;

MLAC_KERNEL __launch_bounds__(kAppendWarps * 32) mlac_append(const __grid_constant__ AppendParams p) {
  const int token = blockIdx.x * kAppendWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
  wait_for_previous_kernel();
  let_next_kernel_start();
  if (token >= p.tokens) return;
  const int slot = p.slots[token], position = p.positions[token];
  // A slot outside of the cache, or a position outside of the table, writes nothing rather than anywhere.
  if (slot < 0 || slot >= p.cache_rows || position < 0 || position >= p.table_rows) return;
  u16* row = static_cast<u16*>(p.cache) + (size_t)slot * (kRank + kRope);
  const uint4* latent = reinterpret_cast<const uint4*>(static_cast<const u16*>(p.latent) + (size_t)token * kRank);
  for (int i = lane; i < kRank / 8; i += 32) reinterpret_cast<uint4*>(row)[i] = latent[i];
  const u16* key = static_cast<const u16*>(p.key) + (size_t)token * kRope;
  for (int i = lane; i < kRope / 2; i += 32) {
    float x = unpack(key[i]), y = unpack(key[i + kRope / 2]);
    float c = p.cosines[(size_t)position * (kRope / 2) + i], s = p.sines[(size_t)position * (kRope / 2) + i];
    row[kRank + i] = narrow(x * c - y * s);
    row[kRank + i + kRope / 2] = narrow(y * c + x * s);
  }
}
