// GQA decode, the baseline: every warp is a stream of its own.
//
// A unit is a KV head of a request. Its rows, head of the group x query token, are padded to blocks of 16. Warp w takes tiles w,
// w + kWarps, ... of the piece through a private ring in shared memory, so no warp ever waits for another; the warps' results are
// added at the end, in order. The cache is read once, in 16-byte pieces that bypass L1.
#pragma once
#include "common.cuh"
#include "mma.cuh"

constexpr int kRows = kHeads * kQueryTokens;
constexpr int kBlocks = ceil_div(kRows, 16);
constexpr int kThreads = kWarps * 32;
constexpr int kChunks = kHeadDim / 8;             // 16-byte pieces of a row
constexpr int kHalfStage = kTile * kHeadDim * 2;  // keys, or values
constexpr int kStageBytes = 2 * kHalfStage;
constexpr int kRingBytes = kStages * kStageBytes;
constexpr int kMergeAt = kWarps * kRingBytes;  // float [warps][rows][2]
constexpr int kSharedBytes = kMergeAt + kWarps * kBlocks * 16 * 8;

static_assert(kPage % kTile == 0 && kTile % 16 == 0 && kHeadDim % 64 == 0 && kStages >= 2, "a tile lies in one page");
static_assert(kBlocks * 16 * kHeadDim * 4 <= kRingBytes, "a warp's result fits into its ring");

// Byte offset of a 16-byte piece: the low three bits of its number are xored with the row's.
MLAC_DEVICE u32 place(int row, int chunk) { return row * (kHeadDim * 2) + ((chunk & ~7) | ((chunk ^ row) & 7)) * 16; }

MLAC_DEVICE void load_tile(const DecodeParams& p, const Piece& piece, const int* pages, u32 stage, int tile, int lane) {
  const int start = tile * kTile;
  const size_t first = ((size_t)pages[start / kPage] * kPage + start % kPage) * (kKvHeads * kHeadDim) + piece.unit * kHeadDim;
  const u16* keys = static_cast<const u16*>(p.cache) + first;
  const u16* values = static_cast<const u16*>(p.values) + first;
#pragma unroll
  for (int i = 0; i < kTile * kChunks / 32; ++i) {
    int token = (i * 32 + lane) / kChunks, chunk = (i * 32 + lane) % kChunks;
    size_t at = (size_t)token * (kKvHeads * kHeadDim) + chunk * 8;
    bool valid = start + token < piece.length;
    copy_async(stage + place(token, chunk), keys + at, valid);
    copy_async(stage + kHalfStage + place(token, chunk), values + at, valid);
  }
}

MLAC_KERNEL __launch_bounds__(kThreads, 1) mlac_decode(const __grid_constant__ DecodeParams p) {
  MLAC_DYNAMIC_SHARED(memory);
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const u32 ring = shared_address(memory) + warp * kRingBytes;
  float* merge = reinterpret_cast<float*>(memory + kMergeAt);
  const int row = lane / 4, column = lane % 4 * 2;
  const float scale = p.scale * kLog2e;
  wait_for_previous_kernel();
  let_next_kernel_start();

  Walk walk(p);
  Piece piece;
  while (walk.next(p, piece)) {
    const int* pages = p.pages + (size_t)piece.request * p.page_stride;
    const int count = piece.end > piece.begin + warp ? (piece.end - piece.begin - warp + kWarps - 1) / kWarps : 0;
    const int first_tile = piece.begin + warp;
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) {
      if (i < count) load_tile(p, piece, pages, ring + i * kStageBytes, first_tile + i * kWarps, lane);
      copy_commit();
    }

    // Rows r = query token * kHeads + head; those beyond kRows are zeros.
    u32 q[kBlocks][kHeadDim / 16][4];
    const u16* queries = static_cast<const u16*>(p.q) + (size_t)piece.request * kQueryTokens * kAllHeads * kHeadDim;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int k = 0; k < kHeadDim / 16; ++k)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          int r = b * 16 + row + j % 2 * 8;
          int c = k * 16 + column + j / 2 * 8;
          size_t at = ((size_t)(r / kHeads) * kAllHeads + piece.unit * kHeads + r % kHeads) * kHeadDim + c;
          q[b][k][j] = r < kRows ? *reinterpret_cast<const u32*>(queries + at) : 0;
        }
    // Tiles between these positions are seen whole by every query token; the others ask row by row.
    const int first = piece.length - kQueryTokens;
    const int whole_from = window_start(piece.length - 1);
    const int whole_to = kMask == 0 ? piece.length : kMask == 1 ? first + 1 : first;

    float o[kBlocks][kHeadDim / 8][4];
    float peak[kBlocks][2], sum[kBlocks][2];
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
      for (int i = 0; i < kHeadDim / 8; ++i) o[b][i][0] = o[b][i][1] = o[b][i][2] = o[b][i][3] = 0.0f;
      peak[b][0] = peak[b][1] = minus_infinity();
      sum[b][0] = sum[b][1] = 0.0f;
    }

    for (int i = 0; i < count; ++i) {
      copy_wait<kStages - 2>();
      __syncwarp();
      if (i + kStages - 1 < count)
        load_tile(p, piece, pages, ring + (i + kStages - 1) % kStages * kStageBytes, first_tile + (i + kStages - 1) * kWarps, lane);
      copy_commit();
      const u32 stage = ring + i % kStages * kStageBytes;
      const int start = (first_tile + i * kWarps) * kTile;
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        float s[kTile / 8][4];
#pragma unroll
        for (int n = 0; n < kTile / 8; ++n) {
          s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0.0f;
#pragma unroll
          for (int k = 0; k < kHeadDim / 32; ++k) {
            u32 keys[4];
            load_4(keys, stage + place(n * 8 + lane % 8, k * 4 + lane / 8));
            multiply(s[n], q[b][2 * k], keys[0], keys[1]);
            multiply(s[n], q[b][2 * k + 1], keys[2], keys[3]);
          }
        }
        if (start < whole_from || start + kTile > whole_to) {
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            int token = min(kQueryTokens - 1, (b * 16 + row + 8 * r) / kHeads);
            const View view = view_of(piece.length, token, kMask == 2 ? p.tree[piece.request * kQueryTokens + token] : 0);
#pragma unroll
            for (int n = 0; n < kTile / 8; ++n)
#pragma unroll
              for (int j = 0; j < 2; ++j)
                if (!view.sees(start + n * 8 + column + j)) s[n][2 * r + j] = minus_infinity();
          }
        }
        float rescale[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          float top = peak[b][r];
#pragma unroll
          for (int n = 0; n < kTile / 8; ++n) top = fmaxf(top, fmaxf(s[n][2 * r], s[n][2 * r + 1]));
          top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
          top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
          float anchor = top == minus_infinity() ? 0.0f : top * scale;
          rescale[r] = exp2_fast(peak[b][r] * scale - anchor);
          peak[b][r] = top;
          float added = 0.0f;
#pragma unroll
          for (int n = 0; n < kTile / 8; ++n) {
            s[n][2 * r] = exp2_fast(s[n][2 * r] * scale - anchor);
            s[n][2 * r + 1] = exp2_fast(s[n][2 * r + 1] * scale - anchor);
            added += s[n][2 * r] + s[n][2 * r + 1];
          }
          sum[b][r] = sum[b][r] * rescale[r] + added;
        }
#pragma unroll
        for (int n = 0; n < kHeadDim / 8; ++n)
#pragma unroll
          for (int j = 0; j < 4; ++j) o[b][n][j] *= rescale[j / 2];
#pragma unroll
        for (int k = 0; k < kTile / 16; ++k) {
          u32 a[4] = {pack(s[2 * k][0], s[2 * k][1]), pack(s[2 * k][2], s[2 * k][3]), pack(s[2 * k + 1][0], s[2 * k + 1][1]),
                      pack(s[2 * k + 1][2], s[2 * k + 1][3])};
#pragma unroll
          for (int n = 0; n < kHeadDim / 8; n += 2) {
            u32 values[4];
            load_4_transposed(values, stage + kHalfStage + place(k * 16 + lane % 16, n + lane / 16));
            multiply(o[b][n], a, values[0], values[1]);
            multiply(o[b][n + 1], a, values[2], values[3]);
          }
        }
      }
      __syncwarp();
    }

    copy_wait<0>();
    __syncwarp();
    float* mine = reinterpret_cast<float*>(memory + warp * kRingBytes);
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int in_unit = b * 16 + row + 8 * r;
        sum[b][r] += __shfl_xor_sync(~0u, sum[b][r], 1);
        sum[b][r] += __shfl_xor_sync(~0u, sum[b][r], 2);
        if (lane % 4 == 0) {
          merge[(warp * kBlocks * 16 + in_unit) * 2] = peak[b][r];
          merge[(warp * kBlocks * 16 + in_unit) * 2 + 1] = sum[b][r];
        }
#pragma unroll
        for (int n = 0; n < kHeadDim / 8; ++n)
          *reinterpret_cast<float2*>(mine + in_unit * kHeadDim + n * 8 + column) = make_float2(o[b][n][2 * r], o[b][n][2 * r + 1]);
      }
    __syncthreads();
    for (int i = threadIdx.x; i < kRows * kHeadDim / 2; i += kThreads) {
      const int in_unit = i / (kHeadDim / 2), c = i % (kHeadDim / 2) * 2;
      const int head = piece.unit * kHeads + in_unit % kHeads, token = in_unit / kHeads;
      float top = minus_infinity();
      for (int w = 0; w < kWarps; ++w) top = fmaxf(top, merge[(w * kBlocks * 16 + in_unit) * 2]);
      const float anchor = top == minus_infinity() ? 0.0f : top * scale;
      float all = 0.0f, x = 0.0f, y = 0.0f;
      for (int w = 0; w < kWarps; ++w) {
        const float* of = merge + (w * kBlocks * 16 + in_unit) * 2;
        const float weight = exp2_fast(of[0] * scale - anchor);
        const float2 part = *reinterpret_cast<const float2*>(memory + w * kRingBytes + (in_unit * kHeadDim + c) * 4);
        all += of[1] * weight;
        x += part.x * weight;
        y += part.y * weight;
      }
      const float lse = all > 0.0f ? anchor + log2_fast(all) : minus_infinity();
      const size_t at = ((size_t)piece.request * kQueryTokens + token) * kAllHeads + head;
      float denominator = all;
      if (piece.slot < 0 && kSinks) denominator += exp2_fast(p.sinks[head] * kLog2e - anchor);
      const float inverse = all > 0.0f ? reciprocal(denominator) : 0.0f;
      if (piece.slot >= 0) {
        if (c == 0) p.lse_part[(size_t)piece.slot * kRows + in_unit] = lse;
        *reinterpret_cast<float2*>(p.out_part + ((size_t)piece.slot * kRows + in_unit) * kHeadDim + c) =
            make_float2(x * inverse, y * inverse);
      } else {
        if (c == 0) p.lse[at] = lse * kLn2;
        *reinterpret_cast<u32*>(static_cast<u16*>(p.out) + at * kHeadDim + c) = pack(x * inverse, y * inverse);
      }
    }
    __syncthreads();  // rings are free for the next piece
  }
}
