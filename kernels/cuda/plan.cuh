// K7, first half: divides the tiles of all units among the parts (CTAs) of a step, on the device.
//
// Unit u costs its tiles and one more for its fixed work. Part p starts where the running cost reaches
// p * payload. A start that would leave fewer than kMinSplit tiles of a unit on one side moves to the unit's edge.
// Every number follows from the lengths alone: no atomics, the same division on every run.
#pragma once
#include "common.cuh"

constexpr int kPlanThreads = 1024;

MLAC_KERNEL __launch_bounds__(kPlanThreads) mlac_plan(const __grid_constant__ PlanParams p) {
  __shared__ int sums[kPlanThreads];
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int units = p.batch * kUnits;
  const int thread = threadIdx.x;
  const int chunk = ceil_div(units, kPlanThreads);
  const int from = min(units, thread * chunk), to = min(units, from + chunk);

  int sum = 0;
  for (int u = from; u < to; ++u) {
    Tiles tiles = unit_tiles(p.lengths[u / kUnits], u % kUnits);
    sum += tiles.end - tiles.begin + 1;
  }
  sums[thread] = sum;
  __syncthreads();
  for (int step = 1; step < kPlanThreads; step *= 2) {
    int other = thread >= step ? sums[thread - step] : 0;
    __syncthreads();
    sums[thread] += other;
    __syncthreads();
  }
  const int total = sums[kPlanThreads - 1];
  int cost = sums[thread] - sum;
  for (int u = from; u < to; ++u) {
    p.costs[u] = cost;
    Tiles tiles = unit_tiles(p.lengths[u / kUnits], u % kUnits);
    cost += tiles.end - tiles.begin + 1;
  }
  if (thread == 0) p.costs[units] = total;
  __syncthreads();

  const int payload = max(ceil_div(total, p.parts), kMinSplit);
  for (int part = thread; part <= p.parts; part += kPlanThreads) {
    int unit = units, tile = 0;
    long long position = (long long)part * payload;
    if (position < total) {
      int low = 0, high = units - 1;  // the last unit that starts at or before the position
      while (low < high) {
        int middle = (low + high + 1) / 2;
        if (p.costs[middle] <= position) low = middle;
        else high = middle - 1;
      }
      unit = low;
      tile = (int)position - p.costs[unit];
      int count = p.costs[unit + 1] - p.costs[unit] - 1;
      if (tile < kMinSplit) {
        tile = 0;
      } else if (count - tile < kMinSplit) {
        unit += 1;
        tile = 0;
      }
    }
    p.bounds[2 * part] = unit;
    p.bounds[2 * part + 1] = tile;
  }
  __syncthreads();

  for (int u = thread; u < units; u += kPlanThreads) {
    int low = 0, high = p.parts - 1;  // the last part that starts at or before the unit
    while (low < high) {
      int middle = (low + high + 1) / 2;
      if (p.bounds[2 * middle] < u || (p.bounds[2 * middle] == u && p.bounds[2 * middle + 1] == 0)) low = middle;
      else high = middle - 1;
    }
    p.owners[2 * u] = low;
    high = p.parts - 1;  // the last part that starts before the unit's end
    while (low < high) {
      int middle = (low + high + 1) / 2;
      if (p.bounds[2 * middle] <= u) low = middle;
      else high = middle - 1;
    }
    p.owners[2 * u + 1] = low;
  }
}
