// Runs the kernels of one request on a problem from a file: main PROBLEM ANSWER.
// The source before this file is the prologue and the kernels, as NVRTC gets them.

#include <fstream>
#include <iostream>
#include <iterator>

template <typename T>
std::vector<T> take(const u8*& from, size_t count) {
  std::vector<T> out(count);
  if (count) std::memcpy(out.data(), from, count * sizeof(T));
  from += count * sizeof(T);
  return out;
}

int main(int, char** arguments) {
  std::ifstream file(arguments[1], std::ios::binary);
  std::vector<char> bytes((std::istreambuf_iterator<char>(file)), {});
  const u8* at = reinterpret_cast<const u8*>(bytes.data());
  const auto head = take<int>(at, 8);
  const int batch = head[0], page_stride = head[1], cache_pages = head[2], parts = head[3], grid = head[4], seed = head[5];
  const float scale = __int_as_float((u32)head[6]);
  const size_t rows = (size_t)batch * kQueryTokens * kAllHeads;
  const int row = kGqa ? kHeadDim : kRank + kRope, out_row = kGqa ? kHeadDim : kRank;
#if MLAC_FP8
  const size_t cache_words = (size_t)cache_pages * kPageBytes / 2;
#else
  const size_t cache_words = (size_t)cache_pages * kPage * (kGqa ? kKvHeads * kHeadDim : row);
#endif
  const auto lengths = take<int>(at, batch);
  const auto pages = take<int>(at, (size_t)batch * page_stride);
  // Copies of 16 bytes want aligned sources.
  auto aligned = [&](size_t count) {
    auto* memory = static_cast<u16*>(std::aligned_alloc(64, (count * 2 + 63) / 64 * 64));
    std::memcpy(memory, at, count * 2);
    at += count * 2;
    return memory;
  };
  const u16* q = aligned(rows * row);
  const u16* cache = aligned(cache_words);
  const u16* values = kGqa ? aligned(cache_words) : nullptr;
  const auto sinks = take<float>(at, kSinks ? kAllHeads : 0);
  const auto tree = take<u64>(at, kMask == 2 ? (size_t)batch * kQueryTokens : 0);

  const size_t unit_rows = kGqa ? kHeads * kQueryTokens : kHeadTile * kGroup;
  std::vector<u16> out(rows * out_row, 0x7fff);
  std::vector<float> lse(rows, NAN), out_part(2 * parts * unit_rows * out_row, NAN), lse_part(2 * parts * unit_rows, NAN);
  std::vector<int> bounds(2 * parts + 2, -1), owners(2 * batch * kUnits, -1), costs(batch * kUnits + 1, -1);

  DecodeParams p{};
  p.q = q;
  p.cache = cache;
  p.values = values;
  p.out = out.data();
  p.lse = lse.data();
  p.out_part = out_part.data();
  p.lse_part = lse_part.data();
  p.sinks = sinks.data();
  p.lengths = lengths.data();
  p.pages = pages.data();
  p.tree = tree.data();
  p.bounds = bounds.data();
  p.owners = owners.data();
  p.batch = batch;
  p.page_stride = page_stride;
  p.parts = parts;
  p.scale = scale;
#if HOST_PLANNED
  PlanParams plan{lengths.data(), bounds.data(), owners.data(), costs.data(), batch, parts};
  machine.run(1, kPlanThreads, seed, [&] { mlac_plan(plan); });
#endif
#if HOST_TMA
#if HOST_GROUPED
  const int columns = kKvHeads * kHeadDim;
  TensorMap key_map{cache, {columns, kPage, cache_pages}, {(u64)columns, (u64)columns * kPage}};
  TensorMap value_map{values, {columns, kPage, cache_pages}, {(u64)columns, (u64)columns * kPage}};
  machine.run(grid, HOST_THREADS, seed, [&] { mlac_decode(p, key_map, value_map); });
#else
  TensorMap query_map{q, {row, kHeads, batch * kQueryTokens}, {(u64)row, (u64)row * kHeads}};
#if MLAC_FP8
  machine.run(grid, HOST_THREADS, seed, [&] { mlac_decode(p, query_map); });
#else
  TensorMap cache_map{cache, {row, kPage, cache_pages}, {(u64)row, (u64)row * kPage}};
  machine.run(grid, HOST_THREADS, seed, [&] { mlac_decode(p, query_map, cache_map); });
#endif
#endif
#else
  machine.run(grid, HOST_THREADS, seed, [&] { mlac_decode(p); });
#endif
#if HOST_PLANNED
  machine.run((int)rows, kCombineWarps * 32, seed, [&] { mlac_combine(p); });
#endif
  std::ofstream answer(arguments[2], std::ios::binary);
  auto put = [&](const auto& numbers) { answer.write(reinterpret_cast<const char*>(numbers.data()), numbers.size() * sizeof numbers[0]); };
  put(out);
  put(lse);
  put(bounds);
  put(owners);
}
