// Runs mlac_append on rows from a file: append PROBLEM ANSWER.

#include <fstream>
#include <iterator>

int main(int, char** arguments) {
  std::ifstream file(arguments[1], std::ios::binary);
  std::vector<char> bytes((std::istreambuf_iterator<char>(file)), {});
  const char* at = bytes.data();
  // Every array into memory of its own, aligned for copies of 16 bytes.
  auto take = [&](size_t size) {
    void* memory = std::aligned_alloc(64, (size + 63) / 64 * 64);
    std::memcpy(memory, at, size);
    at += size;
    return memory;
  };
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
