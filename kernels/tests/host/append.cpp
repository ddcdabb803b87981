// Runs mlac_append on rows from a file: append PROBLEM ANSWER.

#include "problem.h"

int main(int, char** arguments) {
  Problem problem(arguments[1]);
  auto take = [&](size_t size) { return problem.take(size); };
  const int* head = static_cast<const int*>(take(12));
  AppendParams p{};
  p.tokens = head[0];
  p.table_rows = head[1];
  p.cache_rows = head[2] * kPage;
  p.positions = static_cast<const int*>(take(p.tokens * 4));
  p.slots = static_cast<const int*>(take(p.tokens * 4));
  p.cosines = static_cast<const float*>(take((size_t)p.table_rows * kRope * 2));
  p.sines = static_cast<const float*>(take((size_t)p.table_rows * kRope * 2));
  p.latent = take((size_t)p.tokens * kRank * 2);
  p.key = take((size_t)p.tokens * kRope * 2);
#if MLAC_FP8
  const size_t bytes_of_cache = (size_t)head[2] * kPageBytes;
#else
  const size_t bytes_of_cache = (size_t)p.cache_rows * (kRank + kRope) * 2;
#endif
  auto* cache = static_cast<u8*>(std::aligned_alloc(64, bytes_of_cache));
  std::fill(cache, cache + bytes_of_cache, (u8)0xff);
  p.cache = cache;
  machine.run(ceil_div(p.tokens, kAppendWarps), kAppendWarps * 32, 1, [&] { mlac_append(p); });
  std::ofstream(arguments[2], std::ios::binary).write(reinterpret_cast<const char*>(cache), bytes_of_cache);
}
