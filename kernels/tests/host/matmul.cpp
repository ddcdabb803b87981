// Runs mlac_matmul on matrices from a file: matmul PROBLEM ANSWER.

#include "problem.h"

int main(int, char** arguments) {
  Problem problem(arguments[1]);
  auto take = [&](size_t size) { return problem.take(size); };
  const int* head = static_cast<const int*>(take(20));
  MatmulParams p{};
  p.rows = head[0];
  p.columns = head[1];
  p.depth = head[2];
  p.a = static_cast<const u16*>(take((size_t)p.rows * p.depth * 2));
  p.b = static_cast<const u16*>(take((size_t)p.columns * p.depth * 2));
  std::vector<u16> out((size_t)p.rows * p.columns, 0x7fff);
  p.out = out.data();
#if HOST_TMA
  TensorMap a_map{p.a, {p.depth, p.rows, 1}, {(u64)p.depth, (u64)p.depth * p.rows}};
  TensorMap b_map{p.b, {p.depth, p.columns, 1}, {(u64)p.depth, (u64)p.depth * p.columns}};
  machine.run(head[3], HOST_THREADS, head[4], [&] { mlac_matmul(p, a_map, b_map); });
#else
  machine.run(head[3], HOST_THREADS, head[4], [&] { mlac_matmul(p); });
#endif
  std::ofstream(arguments[2], std::ios::binary).write(reinterpret_cast<const char*>(out.data()), out.size() * 2);
}
