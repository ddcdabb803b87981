// A CTA on the CPU: every CUDA thread is a fiber, shared memory an array, waiting a yield.
//
// What the hardware does later is done later here too, as late as it may be: wgmma and cp.async when they are waited for, TMA at a
// random time after it was asked for. Memory that an asynchronous copy is going to fill holds NaN until then. So a kernel that
// reads too early, or gives a stage back too early, gets a wrong answer, and one that waits for what never comes is stopped.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <vector>

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

struct Index {
  int x;
};

struct Fiber {
  ucontext_t context;
  std::vector<u8> stack;
  Index thread;
  bool done = false;
  std::deque<std::vector<std::function<void()>>> copies;  // cp.async: groups, the last one open
};

// A meeting of `count` threads; the last one to come runs `work` for all.
struct Meeting {
  int arrived = 0;
  u64 round = 0;
};

struct Barrier {  // mbarrier
  int expected = 0, pending = 0;
  long long bytes = 0;
  u32 parity = 0;
};

struct Warp {
  Meeting meeting;
  u64 values[2][32][4];
};

struct Multiplication {  // one wgmma of a warpgroup
  std::function<void(int)> of_thread;
};

struct Warpgroup {
  Meeting meeting;
  std::function<void()> issue[128];
  std::deque<std::vector<std::function<void()>>> groups;  // the last one open
};

struct Machine {
  static constexpr int kShared = 256 * 1024;
  alignas(1024) u8 shared[kShared];
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<Warpgroup> groups;
  std::map<u32, Barrier> barriers;
  std::map<int, Meeting> named;
  std::vector<std::function<void()>> loads;  // TMA in flight
  ucontext_t scheduler;
  int current = 0;
  Index block{0}, grid{1};
  u64 events = 0;  // anything that may let somebody go on
  u64 random = 1;
  const char* waiting_for = "";

  u64 next_random() {
    random ^= random << 13;
    random ^= random >> 7;
    random ^= random << 17;
    return random;
  }

  void yield() { swapcontext(&fibers[current].context, &scheduler); }

  [[noreturn]] void fail(const char* what) {
    std::fprintf(stderr, "%s (block %d, thread %d, last waited for: %s)\n", what, block.x, fibers.empty() ? -1 : fibers[current].thread.x,
                 waiting_for);
    std::_Exit(3);
  }

  template <typename Condition>
  void wait(const char* what, Condition condition) {
    while (!condition()) {
      waiting_for = what;
      yield();
    }
  }

  template <typename Work>
  void meet(Meeting& meeting, int count, const char* what, Work work) {
    u64 round = meeting.round;
    if (++meeting.arrived == count) {
      work();
      meeting.arrived = 0;
      ++meeting.round;
      ++events;
    } else {
      wait(what, [&] { return meeting.round != round; });
    }
  }

  Warp& warp() { return warps[fibers[current].thread.x / 32]; }
  Warpgroup& group() { return groups[fibers[current].thread.x / 128]; }
  int lane() { return fibers[current].thread.x % 32; }

  // Every lane gives up to four words and sees all of them.
  template <typename Read>
  auto exchange(const u64 (&mine)[4], const char* what, Read read) {
    Warp& w = warp();
    int buffer = w.meeting.round % 2;
    for (int i = 0; i < 4; ++i) w.values[buffer][lane()][i] = mine[i];
    meet(w.meeting, 32, what, [] {});
    return read(w.values[buffer]);
  }

  void settle(Barrier& b) {
    if (b.pending == 0 && b.bytes == 0) {
      b.parity ^= 1;
      b.pending = b.expected;
      ++events;
    }
  }

  void land_one() {
    size_t at = next_random() % loads.size();
    auto load = loads[at];
    loads.erase(loads.begin() + at);
    load();
    ++events;
  }

  // Every thread of these goes on until it waits; how many are not done.
  int step(int from, int to) {
    int alive = 0;
    for (current = from; current < to; ++current) {
      if (fibers[current].done) continue;
      swapcontext(&scheduler, &fibers[current].context);
      alive += !fibers[current].done;
    }
    current = 0;
    return alive;
  }

  template <typename Kernel>
  void run(int blocks, int threads, u64 seed, Kernel kernel);
};

inline Machine machine;

inline std::function<void()> entry;

inline void fiber_main() {
  entry();
  machine.fibers[machine.current].done = true;
  ++machine.events;
  machine.yield();
}

template <typename Kernel>
void Machine::run(int blocks, int threads, u64 seed, Kernel kernel) {
  entry = kernel;
  random = seed * 2 + 1;
  grid.x = blocks;
  for (block.x = 0; block.x < blocks; ++block.x) {
    std::memset(shared, 0xff, sizeof shared);
    barriers.clear();
    named.clear();
    warps.assign((threads + 31) / 32, Warp{});
    groups = std::vector<Warpgroup>((threads + 127) / 128);
    fibers.resize(threads);
    for (int t = 0; t < threads; ++t) {
      Fiber& f = fibers[t];
      f.stack.resize(128 * 1024);
      f.thread.x = t;
      f.done = false;
      f.copies.clear();
      getcontext(&f.context);
      f.context.uc_stack.ss_sp = f.stack.data();
      f.context.uc_stack.ss_size = f.stack.size();
      f.context.uc_link = nullptr;
      makecontext(&f.context, fiber_main, 0);
    }
    // The seed chooses a warpgroup (of a small CTA a warp) that in every turn goes on until it waits for somebody else, before the others
    // take a step; or none. So a barrier that is missing lets one side run ahead as far as the other barriers allow.
    const int together = threads > 128 ? 128 : 32;
    const int favoured = (int)(seed % (threads / together + 1)) - 1;
    int idle = 0;
    for (int alive = threads; alive > 0;) {
      u64 before = events;
      if (favoured >= 0) {
        u64 seen;
        do {
          seen = events;
          step(favoured * together, (favoured + 1) * together);
        } while (events != seen);
      }
      alive = step(0, threads);
      if (!loads.empty() && (events == before || next_random() % 2)) land_one();
      idle = events == before ? idle + 1 : 0;
      if (idle > 3) fail("nobody can go on");
    }
    if (!loads.empty()) fail("TMA loads that nobody waited for");
  }
}

struct float2 {
  float x, y;
};
struct uint4 {
  u32 x, y, z, w;
};
struct alignas(8) uint2 {
  u32 x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }

#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static
#define threadIdx (machine.fibers[machine.current].thread)
#define blockIdx (machine.block)
#define gridDim (machine.grid)

using std::max;
using std::min;

inline float __uint_as_float(u32 bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline float __int_as_float(u32 bits) { return __uint_as_float(bits); }
inline u32 float_bits(float x) {
  u32 bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline u32 __float_as_uint(float x) { return float_bits(x); }
inline int __popcll(u64 x) { return __builtin_popcountll(x); }
inline int __popc(u32 x) { return __builtin_popcount(x); }

template <typename T>
T shuffle(T value, int from) {
  u64 word = 0;
  std::memcpy(&word, &value, sizeof value);
  u64 words[4] = {word, 0, 0, 0};
  return machine.exchange(words, "shfl", [&](u64 (&all)[32][4]) {
    T out;
    std::memcpy(&out, &all[from & 31][0], sizeof out);
    return out;
  });
}
template <typename T>
T __shfl_sync(u32, T value, int from) {
  return shuffle(value, from);
}
template <typename T>
T __shfl_xor_sync(u32, T value, int mask) {
  return shuffle(value, machine.lane() ^ mask);
}
inline u32 __ballot_sync(u32, bool vote) {
  u64 words[4] = {vote, 0, 0, 0};
  return machine.exchange(words, "ballot", [](u64 (&all)[32][4]) {
    u32 votes = 0;
    for (int i = 0; i < 32; ++i) votes |= (u32)all[i][0] << i;
    return votes;
  });
}
inline void __syncwarp() {
  u64 words[4] = {};
  machine.exchange(words, "syncwarp", [](u64 (&)[32][4]) { return 0; });
}
inline void __syncthreads() { machine.meet(machine.named[0], (int)machine.fibers.size(), "syncthreads", [] {}); }
