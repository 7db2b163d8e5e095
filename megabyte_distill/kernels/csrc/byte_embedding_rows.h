// F1: what its forward and backward passes share: how a row lies on threads, and a byte's row plus its state.
#pragma once
#include "kernel.h"

namespace mbk {
namespace {

constexpr int kIds = 256;          // at most, in a table
constexpr int kFlatThreads = 256;  // of blocks that need no sum over the width

// Numbers a thread handles of a row of T: 16 bytes.
template <class T>
constexpr int kNumbers = 16 / int(sizeof(T));

// Threads and tiles of a row of ``width`` numbers, N a thread.
inline dim3 flat_grid(int64_t blocks, int64_t width, int numbers, int* threads) {
  *threads = int(min(int64_t(kFlatThreads), ceil_div<int64_t>(ceil_div<int64_t>(width, numbers), 32) * 32));
  return dim3(unsigned(blocks), unsigned(ceil_div<int64_t>(width, int64_t(*threads) * numbers)));
}
template <int N>
__device__ __forceinline__ int64_t flat_column() {
  return (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * N;
}
__device__ __forceinline__ bool in_table(int64_t id, int64_t ids_in_table) { return id >= 0 && id < ids_in_table; }

// With an added state every row has its own norm; a block holds whole rows, so that one barrier serves several.
template <int PASSES>
constexpr int kNormRows = 2 / PASSES;
constexpr int kNormRowsPerBlock = 16;

template <class T>
__device__ __forceinline__ void load_sum(const T* table, const T* added, int64_t id, int64_t ids_in_table, int64_t row,
                                         int64_t width, int column, float (&x)[kVec]) {
  float more[kVec];
  fill(x, nan());
  if (in_table(id, ids_in_table)) load(table + id * width + column, x);
  load(added + row * width + column, more);
#pragma unroll
  for (int i = 0; i < kVec; ++i) x[i] += more[i];
}

}  // namespace
}  // namespace mbk
