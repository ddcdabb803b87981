// The arrays of a problem's file, in order.

#pragma once

#include <fstream>
#include <iterator>

struct Problem {
  std::vector<char> bytes;
  const char* at;

  explicit Problem(const char* path) {
    std::ifstream file(path, std::ios::binary);
    bytes.assign(std::istreambuf_iterator<char>(file), {});
    at = bytes.data();
  }

  // Every array into memory of its own, aligned for copies of 16 bytes.
  void* take(size_t size) {
    void* memory = std::aligned_alloc(64, (size + 63) / 64 * 64);
    std::memcpy(memory, at, size);
    at += size;
    return memory;
  }
};
