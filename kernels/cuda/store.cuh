// What an operator of a graph needs before the attention: stores the new rows of a step, and makes lengths and pages of its inputs.
//
// The rows come with their keys rotated. One warp a token.
#pragma once
#include "common.cuh"

// Mirrored by `params::StoreParams`.
struct StoreParams {
  const void* rows;        // [batch, kQueryTokens, kRank + kRope]
  void* cache;             // [pages, kPage, kRank + kRope], written
  const int* past;         // [batch]: cached tokens before the step
  const int* table;        // [batch, page_stride]; null: request b has the pages b * page_stride and following
  int* lengths;            // [batch], written: with the new tokens
  int* pages;              // [batch, page_stride], written when there is no table
  int batch;
  int page_stride;
  int cache_pages;
};

constexpr int kStoreWarps = 4;

MLAC_KERNEL __launch_bounds__(kStoreWarps * 32) mlac_store(const __grid_constant__ StoreParams p) {
  const int row = blockIdx.x * kStoreWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
  const int request = row / kQueryTokens, token = row % kQueryTokens;
  if (request >= p.batch) return;
  if (p.table == nullptr) {
    for (int j = token * 32 + lane; j < p.page_stride; j += kQueryTokens * 32) {
      p.pages[(size_t)request * p.page_stride + j] = request * p.page_stride + j;
    }
  }
  const int past = p.past[request];
  if (token == 0 && lane == 0) p.lengths[request] = past + kQueryTokens;
  // A position beyond the table, or a page outside of the cache, stores nothing rather than anywhere.
  if (past < 0 || past >= p.page_stride * kPage - token) return;
  const int position = past + token;
  const int column = position / kPage;
  const int page = p.table == nullptr ? request * p.page_stride + column : p.table[(size_t)request * p.page_stride + column];
  if (page < 0 || page >= p.cache_pages) return;
  constexpr int kRow = kRank + kRope;
  const uint4* from = reinterpret_cast<const uint4*>(static_cast<const u16*>(p.rows) + (size_t)row * kRow);
  uint4* to = reinterpret_cast<uint4*>(static_cast<u16*>(p.cache) + ((size_t)page * kPage + position % kPage) * kRow);
  for (int i = lane; i < kRow / 8; i += 32) to[i] = from[i];
}
