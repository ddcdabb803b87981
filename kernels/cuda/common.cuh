// What every kernel shares: numbers, parameters, the division of the work.
//
// The generated prologue stands before this file. It defines, as constants:
//   kHeads          query heads (GQA: query heads of one KV head)
//   kKvHeads        KV heads of the cache (MLA: 1)
//   kRank, kRope    a cache row is [latent kRank | rotated key kRope]; kHeadDim for GQA
//   kPage           tokens in a page of the cache
//   kTile           tokens in a tile of the kernel
//   kQueryTokens    query tokens of a request, the last ones of its cache
//   kWindow         sliding window in tokens, 0 for none
//   kSinks          whether each head has a sink
//   kMask           0 every cached token, 1 causal, 2 tree
//   kHeadTile       heads in a row tile; a row tile belongs to one query token
//   kGroup          row tiles that one CTA computes together
//   kPlanned        whether a plan divides the work (split KV), or a CTA takes whole units
//   kMinSplit       fewest tiles in a piece of a split unit
//   kBuffers        dequantised tiles that are turned over, 0 without an FP8 cache
// MLAC_F16 is 1 when queries and output are f16, 0 when they are bf16.
// MLAC_FP8 is 1 when the cache is as `fp8.cuh` says and all factors of multiplications are f16; else they are what queries are.
#pragma once
#include "ptx.cuh"

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

constexpr bool kFp8 = MLAC_FP8;

MLAC_CONSTEXPR int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Row tiles of a request (MLA) and units of a request. GQA: a unit is a KV head.
constexpr int kHeadTiles = ceil_div(kHeads, kHeadTile);
constexpr int kRowTiles = kQueryTokens * kHeadTiles;
constexpr int kAllHeads = kHeads * kKvHeads;
constexpr int kUnits = kKvHeads > 1 || kGqa ? kKvHeads : ceil_div(kRowTiles, kGroup);

// Mirrored by `params::DecodeParams` in Rust, field by field.
struct DecodeParams {
  const void* q;           // MLA [batch, query tokens, heads, row]; GQA [batch, query tokens, kv heads * heads, d]
  const void* cache;       // MLA [pages, page, row] or as fp8.cuh says; GQA keys [pages, page, kv heads, d]
  const void* values;      // GQA values, as the keys; MLA null
  void* out;               // [batch, query tokens, all heads, rank or d]
  float* lse;              // [batch, query tokens, all heads], natural logarithm, without the sink
  float* out_part;         // [2 * parts, rows of a unit, rank or d]: normalised pieces of split units
  float* lse_part;         // [2 * parts, rows of a unit], base 2
  const float* sinks;      // [all heads]
  const int* lengths;      // [batch]: cached tokens, the query tokens among them
  const int* pages;        // [batch, page_stride]
  const u64* tree;         // [batch, query tokens]: bit j: sees draft token j
  const int* bounds;       // [parts + 1, 2]: first unit and first tile of each part
  const int* owners;       // [units, 2]: first and last part of each unit
  int batch;
  int page_stride;
  int parts;
  float scale;             // of the scores
};

// Mirrored by `params::PlanParams`.
struct PlanParams {
  const int* lengths;      // [batch]
  int* bounds;             // [parts + 1, 2]
  int* owners;             // [units, 2]
  int* costs;              // [units + 1], scratch
  int batch;
  int parts;
};

// What one query token of a request sees: cached tokens lo..hi, those from `draft` on by the tree's bits.
struct View {
  int lo;
  int hi;
  int draft;
  u64 tree;

  MLAC_DEVICE bool sees(int position) const {
    if (position < lo || position >= hi) return false;
    if (kMask == 2 && position >= draft) return (tree >> (position - draft)) & 1;
    return true;
  }

  // The same for the 64 tokens from `start` on, one bit each.
  MLAC_DEVICE u64 columns(int start) const {
    u64 seen = below(hi - start) & ~below(lo - start);
    if (kMask == 2) {
      int first = draft - start;
      u64 drafted = first >= 64 || first <= -64 ? 0 : first >= 0 ? tree << first : tree >> -first;
      seen &= below(first) | drafted;
    }
    return seen;
  }

  // The lowest `count` bits.
  static MLAC_DEVICE u64 below(int count) { return count <= 0 ? 0 : count >= 64 ? ~0ull : (1ull << count) - 1; }

  // Whether a tile starting there needs no mask.
  MLAC_DEVICE bool whole(int start) const {
    return start >= lo && start + kTile <= (kMask == 2 ? draft : hi);
  }
};

// First token that a query token at `position` sees.
MLAC_DEVICE int window_start(int position) {
  return kWindow == 0 ? 0 : max(0, position - kWindow + 1);
}

MLAC_DEVICE View view_of(int length, int token, u64 tree) {
  View view;
  int first = length - kQueryTokens;  // position of the first query token
  int position = first + token;
  view.draft = max(0, first);
  view.tree = tree;
  if (kMask == 0) position = length - 1;
  if (kMask == 2) position = first + __popcll(tree & View::below(kQueryTokens)) - 1;  // its depth in the tree
  view.lo = window_start(position);
  view.hi = kMask == 2 ? length : max(0, min(length, position + 1));
  if (kMask == 2 && first < 0) view.hi = 0;
  return view;
}

// Two weights in the type of the multiplications.
MLAC_DEVICE u32 pack_weights(float low, float high) { return kFp8 ? pack_f16(low, high) : pack(low, high); }

struct Tiles {
  int begin;
  int end;
};

// The tiles that any query token of a unit sees.
MLAC_DEVICE Tiles unit_tiles(int length, int unit) {
  int first = 0, last = kQueryTokens - 1;
  if (!kGqa) {
    first = unit * kGroup / kHeadTiles;
    last = min(kQueryTokens - 1, ((unit + 1) * kGroup - 1) / kHeadTiles);
  }
  int base = length - kQueryTokens;
  int hi = kMask == 1 ? max(0, min(length, base + last + 1)) : length;
  if (kMask == 2 && base < 0) hi = 0;
  // A tree's shallowest token may be any of its tokens.
  int low_position = kMask == 0 ? length - 1 : kMask == 1 ? base + first : base;
  int lo = window_start(low_position);
  Tiles tiles;
  tiles.begin = lo / kTile;
  tiles.end = hi <= lo ? tiles.begin : ceil_div(hi, kTile);
  return tiles;
}

// A piece of a unit that one CTA computes.
struct Piece {
  int request;
  int unit;    // of the request
  int length;
  int begin;   // tiles
  int end;
  int slot;    // where a split unit's piece is put, -1 when the unit is whole
};

// The pieces of this CTA, in order. Every warp walks the same ones.
struct Walk {
  int unit, stop_unit, stop_tile, first_tile;
  bool first;

  MLAC_DEVICE explicit Walk(const DecodeParams& p) {
    first = true;
    if (kPlanned) {
      unit = p.bounds[2 * blockIdx.x];
      first_tile = p.bounds[2 * blockIdx.x + 1];
      stop_unit = p.bounds[2 * blockIdx.x + 2];
      stop_tile = p.bounds[2 * blockIdx.x + 3];
    } else {
      unit = blockIdx.x;
      first_tile = 0;
      stop_unit = p.batch * kUnits;
      stop_tile = 0;
    }
  }

  MLAC_DEVICE bool next(const DecodeParams& p, Piece& piece) {
    while (unit < stop_unit || (unit == stop_unit && first_tile < stop_tile)) {
      int here = unit;
      piece.request = here / kUnits;
      piece.unit = here % kUnits;
      piece.length = p.lengths[piece.request];
      Tiles tiles = unit_tiles(piece.length, piece.unit);
      int count = tiles.end - tiles.begin;
      int from = first_tile;
      int to = kPlanned && here == stop_unit ? stop_tile : count;
      bool opening = first;
      first = false;
      first_tile = 0;
      unit += kPlanned ? 1 : gridDim.x;
      if (from == to && count > 0) continue;
      piece.begin = tiles.begin + from;
      piece.end = tiles.begin + to;
      bool split = from > 0 || to < count;
      piece.slot = split ? 2 * (int)blockIdx.x + (opening ? 0 : 1) : -1;
      return true;
    }
    return false;
  }
};
