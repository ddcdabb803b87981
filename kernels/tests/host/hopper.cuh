// The CPU's version of cuda/hopper.cuh.
#pragma once
#include "ptx.cuh"

// What a test puts into a tensor map: three dimensions, the first contiguous, boxes of 64 x 64 x 1.
struct alignas(64) TensorMap {
  const u16* base;
  int extent[3];
  u64 stride[2];  // numbers from one of the second, of the third, to the next
};

inline u32 shared_address(const void* pointer) { return (u32)(static_cast<const u8*>(pointer) - machine.shared); }

inline void barrier_init(u32 barrier, u32 arrivals) {
  Barrier& b = machine.barriers[barrier];
  b.expected = b.pending = (int)arrivals;
}
inline Barrier& barrier_at(u32 address) {
  auto found = machine.barriers.find(address);
  if (found == machine.barriers.end()) machine.fail("no mbarrier there");
  return found->second;
}
inline void barrier_arrive(u32 barrier) {
  Barrier& b = barrier_at(barrier);
  if (--b.pending < 0) machine.fail("more arrivals than the mbarrier expects");
  machine.settle(b);
}
inline void barrier_expect(u32 barrier, u32 bytes) {
  barrier_at(barrier).bytes += bytes;
  barrier_arrive(barrier);
}
inline void barrier_wait(u32 barrier, u32 parity) {
  Barrier& b = barrier_at(barrier);
  machine.wait("mbarrier", [&] { return b.parity != parity; });
}
inline void fence_barrier_init() {}
inline void fence_async_proxy() {}
inline void tma_prefetch_map(const TensorMap*) {}

// The 128-byte swizzle: bits 4 to 6 of the address are xored with bits 7 to 9.
inline u32 swizzled(u32 address) { return address ^ (address >> 3 & 0x70); }

inline void tma_load(u32 destination, const TensorMap* map, int c0, int c1, int c2, u32 barrier) {
  if (destination % 1024 != 0) machine.fail("a tile that does not begin at a multiple of 1024");
  std::memset(machine.shared + destination, 0xff, 8192);
  machine.loads.push_back([=] {
    for (int r = 0; r < 64; ++r)
      for (int c = 0; c < 64; ++c) {
        bool inside = c0 + c < map->extent[0] && c1 + r < map->extent[1] && c2 >= 0 && c2 < map->extent[2];
        u16 number = inside ? map->base[(u64)c2 * map->stride[1] + (u64)(c1 + r) * map->stride[0] + c0 + c] : 0;
        std::memcpy(machine.shared + swizzled(destination + r * 128 + c * 2), &number, 2);
      }
    Barrier& b = barrier_at(barrier);
    b.bytes -= 8192;
    if (b.bytes < 0) machine.fail("more bytes than the mbarrier expects");
    machine.settle(b);
  });
}

inline void bulk_load(u32 destination, const void* source, int bytes, u32 barrier) {
  if (destination % 16 != 0 || (u64)source % 16 != 0 || bytes % 16 != 0) machine.fail("a copy that is not aligned to 16");
  std::memset(machine.shared + destination, 0xff, bytes);
  machine.loads.push_back([=] {
    std::memcpy(machine.shared + destination, source, bytes);
    Barrier& b = barrier_at(barrier);
    b.bytes -= bytes;
    if (b.bytes < 0) machine.fail("more bytes than the mbarrier expects");
    machine.settle(b);
  });
}

template <int Registers>
void keep_registers() {}
template <int Registers>
void take_registers() {}

inline void wgmma_fence() {}

inline std::vector<std::function<void()>>& open_group(Warpgroup& group) {
  if (group.groups.empty()) group.groups.emplace_back();
  return group.groups.back();
}

inline void wgmma_commit() {
  Warpgroup& group = machine.group();
  machine.meet(group.meeting, 128, "wgmma commit", [&] {
    open_group(group);
    group.groups.emplace_back();
  });
}

template <int Pending>
void wgmma_wait() {
  Warpgroup& group = machine.group();
  machine.meet(group.meeting, 128, "wgmma wait", [&] {
    while (group.groups.size() > Pending + 1) {
      for (auto& work : group.groups.front()) work();
      group.groups.pop_front();
    }
    if (Pending == 0 && !group.groups.empty() && !group.groups.front().empty()) machine.fail("a wgmma that was never committed");
  });
}

template <int N>
void pin(float (&)[N]) {}
template <int N>
void pin(u32 (&)[N]) {}

inline u64 descriptor(u64 fixed, u32 address) { return fixed | ((address & 0x3ffff) >> 4); }

// What a descriptor reads: the PTX ISA's canonical layouts for 2-byte elements and the 128-byte swizzle.
inline float element(u64 descriptor, bool transposed, int mn, int k) {
  if (descriptor >> 62 != 1) machine.fail("a descriptor without the 128-byte swizzle");
  u32 start = (u32)(descriptor & 0x3fff) * 16;
  u32 leading = (u32)(descriptor >> 16 & 0x3fff) * 16, stride = (u32)(descriptor >> 32 & 0x3fff) * 16;
  u32 at = transposed ? start + mn % 64 * 2 + mn / 64 * leading + k % 8 * 128 + k / 8 * stride
                      : start + mn % 8 * 128 + mn / 8 * stride + k * 2;
  u16 bits;
  std::memcpy(&bits, machine.shared + swizzled(at), 2);
  return factor(bits);
}

// All threads of a warpgroup bring their registers; `work` multiplies when it is waited for.
struct Brought {
  float* d[128];
  const u32* a[128];
};

template <typename Work>
void bring(float* d, const u32* a, Work work) {
  static Brought brought[16];
  int which = machine.fibers[machine.current].thread.x / 128;
  int thread = machine.fibers[machine.current].thread.x % 128;
  brought[which].d[thread] = d;
  brought[which].a[thread] = a;
  Warpgroup& group = machine.group();
  machine.meet(group.meeting, 128, "wgmma", [&] {
    Brought all = brought[which];
    open_group(group).push_back([=] { work(all); });
  });
}

// The register of thread t that holds element (row, column) of an accumulator.
inline float& accumulator(const Brought& all, int row, int column) {
  int thread = row / 16 * 32 + row % 8 * 4 + column % 8 / 2;
  return all.d[thread][column / 8 * 4 + row % 16 / 8 * 2 + column % 2];
}

template <int N>
void wgmma_scores(float (&d)[N], u64 a, u64 b, int add) {
  bring(d, nullptr, [=](const Brought& all) {
    for (int m = 0; m < 64; ++m)
      for (int n = 0; n < 2 * N; ++n) {
        float sum = 0.0f;
        for (int k = 0; k < 16; ++k) sum += element(a, false, m, k) * element(b, false, n, k);
        float& out = accumulator(all, m, n);
        out = add ? out + sum : sum;
      }
  });
}

// The number of a first operand in registers: row m, multiplied dimension k.
inline float first_factor(const Brought& all, int m, int k) {
  u32 word = all.a[m / 16 * 32 + m % 8 * 4 + k % 8 / 2][k / 8 * 2 + m % 16 / 8];
  return factor((u16)(k % 2 ? word >> 16 : word));
}

inline void wgmma_scores(float (&d)[32], const u32* a, u64 b, int add) {
  bring(d, a, [=](const Brought& all) {
    for (int m = 0; m < 64; ++m)
      for (int n = 0; n < 64; ++n) {
        float sum = 0.0f;
        for (int k = 0; k < 16; ++k) sum += first_factor(all, m, k) * element(b, false, n, k);
        float& out = accumulator(all, m, n);
        out = add ? out + sum : sum;
      }
  });
}

template <int N>
void wgmma_values(float (&d)[N], const u32* a, u64 b) {
  bring(d, a, [=](const Brought& all) {
    static float values[16][2 * N];
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < 2 * N; ++n) values[k][n] = element(b, true, n, k);
    for (int m = 0; m < 64; ++m) {
      float weights[16];
      for (int k = 0; k < 16; ++k) weights[k] = first_factor(all, m, k);
      for (int n = 0; n < 2 * N; ++n) {
        float sum = 0.0f;
        for (int k = 0; k < 16; ++k) sum += weights[k] * values[k][n];
        accumulator(all, m, n) += sum;
      }
    }
  });
}

template <int N>
void wgmma_values(float (&d)[N], u64 a, u64 b) {
  bring(d, nullptr, [=](const Brought& all) {
    static float weights[64][16], values[16][2 * N];
    for (int k = 0; k < 16; ++k) {
      for (int m = 0; m < 64; ++m) weights[m][k] = element(a, false, m, k);
      for (int n = 0; n < 2 * N; ++n) values[k][n] = element(b, true, n, k);
    }
    for (int m = 0; m < 64; ++m)
      for (int n = 0; n < 2 * N; ++n) {
        float sum = 0.0f;
        for (int k = 0; k < 16; ++k) sum += weights[m][k] * values[k][n];
        accumulator(all, m, n) += sum;
      }
  });
}
