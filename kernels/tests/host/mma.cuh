// The CPU's version of cuda/mma.cuh.
#pragma once
#include "ptx.cuh"

inline u32 shared_address(const void* pointer) { return (u32)(static_cast<const u8*>(pointer) - machine.shared); }

inline std::vector<std::function<void()>>& open_copies() {
  auto& copies = machine.fibers[machine.current].copies;
  if (copies.empty()) copies.emplace_back();
  return copies.back();
}

inline void copy_async(u32 destination, const void* source, bool valid) {
  if (destination % 16 != 0 || (u64)source % 16 != 0) machine.fail("a copy of 16 bytes that is not aligned to 16");
  std::memset(machine.shared + destination, 0xff, 16);
  open_copies().push_back([=] {
    if (valid) std::memcpy(machine.shared + destination, source, 16);
    else std::memset(machine.shared + destination, 0, 16);
  });
}

inline void copy_commit() {
  open_copies();
  machine.fibers[machine.current].copies.emplace_back();
}

template <int Pending>
void copy_wait() {
  auto& copies = machine.fibers[machine.current].copies;
  while (copies.size() > Pending + 1) {
    for (auto& copy : copies.front()) copy();
    copies.pop_front();
  }
}

// Every lane gives the address of a row of 16 bytes; matrix i has the rows of lanes 8 i to 8 i + 7.
template <int N>
void load_matrices(u32 (&m)[N], u32 address, bool transposed) {
  if (address % 16 != 0) machine.fail("a row of ldmatrix that is not aligned to 16");
  u64 words[4] = {address, 0, 0, 0};
  int lane = machine.lane();
  machine.exchange(words, "ldmatrix", [&](u64 (&all)[32][4]) {
    for (int i = 0; i < N; ++i) {
      u32 pair = 0;
      for (int j = 0; j < 2; ++j) {
        int row = transposed ? lane % 4 * 2 + j : lane / 4;
        int column = transposed ? lane / 4 : lane % 4 * 2 + j;
        u16 bits;
        std::memcpy(&bits, machine.shared + all[i * 8 + row][0] + column * 2, 2);
        pair |= (u32)bits << (16 * j);
      }
      m[i] = pair;
    }
    return 0;
  });
  __syncwarp();  // nobody overwrites what another lane has yet to read
}

inline void load_2(u32 (&m)[2], u32 address) { load_matrices(m, address, false); }
inline void load_4(u32 (&m)[4], u32 address) { load_matrices(m, address, false); }
inline void load_4_transposed(u32 (&m)[4], u32 address) { load_matrices(m, address, true); }

inline float half_of(u64 word, int which) { return factor((u16)(word >> (16 * which))); }

inline void multiply(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  u64 words[4] = {a[0] | (u64)a[1] << 32, a[2] | (u64)a[3] << 32, b0 | (u64)b1 << 32, 0};
  int lane = machine.lane();
  machine.exchange(words, "mma", [&](u64 (&all)[32][4]) {
    for (int i = 0; i < 4; ++i) {
      int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      float sum = 0.0f;
      for (int k = 0; k < 16; ++k) {
        // a: register (row / 8) + 2 * (k / 8) of lane row % 8 * 4 + k % 8 / 2; b: register k / 8 of lane column * 4 + k % 8 / 2.
        u64 x = all[row % 8 * 4 + k % 8 / 2][k / 8] >> (row / 8 * 32);
        u64 y = all[column * 4 + k % 8 / 2][2] >> (k / 8 * 32);
        sum += half_of(x, k % 2) * half_of(y, k % 2);
      }
      d[i] += sum;
    }
    return 0;
  });
}
