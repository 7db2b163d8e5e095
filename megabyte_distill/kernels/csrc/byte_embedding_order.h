// F1 backward: the order of the bytes by their ids, stable, and where each id's run begins.
#pragma once
#include "byte_embedding_rows.h"

namespace mbk {
namespace {

constexpr int kOrderThreads = 256;  // one an id
constexpr int kOrderWarps = kOrderThreads / 32;
constexpr int kOrderBlocks = 64;  // at most

// counts[block, id] of the block's span of bytes. Integer sums are the same in any order.
__global__ void __launch_bounds__(kOrderThreads)
    count_ids(const int64_t* __restrict__ ids, int* __restrict__ counts, int64_t rows, int64_t span,
              int64_t ids_in_table) {
  int* const own = shared_memory<int>();
  own[threadIdx.x] = 0;
  __syncthreads();
  const int64_t first = int64_t(blockIdx.x) * span, end = min(first + span, rows);
  for (int64_t t = first + threadIdx.x; t < end; t += kOrderThreads) {
    const int64_t id = __ldg(ids + t);
    if (in_table(id, ids_in_table)) atomicAdd(own + id, 1);
  }
  __syncthreads();
  counts[blockIdx.x * kIds + threadIdx.x] = own[threadIdx.x];
}

// Exclusive sum of x over the block's threads.
__device__ __forceinline__ int sum_before(int x, int* memory) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, own = x;
#pragma unroll
  for (int offset = 1; offset < 32; offset <<= 1) {
    const int before = __shfl_up_sync(kAll, x, offset);
    if (lane >= offset) x += before;
  }
  if (lane == 31) memory[warp] = x;
  __syncthreads();
  for (int w = 0; w < warp; ++w) x += memory[w];
  return x - own;
}

// order: places of the bytes, sorted by id, equal ids as they stand; run_starts[id]: first place of an id in it, and the
// number of all at the end. Bytes outside the table have no place.
__global__ void __launch_bounds__(kOrderThreads)
    place_ids(const int64_t* __restrict__ ids, const int* __restrict__ counts, int* __restrict__ order,
              int* __restrict__ run_starts, int64_t rows, int64_t span, int blocks, int64_t ids_in_table) {
  int* const next = shared_memory<int>();  // [warps, ids]: where the warp's next byte of an id goes
  int* const sums = next + kOrderWarps * kIds;
  int before = 0, all = 0;
#pragma unroll 16
  for (int block = 0; block < blocks; ++block) {
    const int count = __ldg(counts + block * kIds + threadIdx.x);
    all += count;
    if (block < int(blockIdx.x)) before += count;
  }
  const int start = sum_before(all, sums);
  if (blockIdx.x == 0) {
    run_starts[threadIdx.x] = start;
    if (threadIdx.x == kIds - 1) run_starts[kIds] = start + all;
  }
  for (int i = threadIdx.x; i < kOrderWarps * kIds; i += kOrderThreads) next[i] = 0;
  __syncthreads();
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  int* const own = next + warp * kIds;
  const int64_t first = int64_t(blockIdx.x) * span + warp * (span / kOrderWarps);
  const int64_t end = min(first + span / kOrderWarps, rows);
  for (int64_t t = first + lane; t < end; t += 32) {
    const int64_t id = __ldg(ids + t);
    if (in_table(id, ids_in_table)) atomicAdd(own + id, 1);
  }
  __syncthreads();
  int running = start + before;
  for (int w = 0; w < kOrderWarps; ++w) {
    const int count = next[w * kIds + threadIdx.x];
    next[w * kIds + threadIdx.x] = running;
    running += count;
  }
  __syncthreads();
  for (int64_t base = first; base < end; base += 32) {
    const int64_t t = base + lane, id = t < end ? __ldg(ids + t) : -1;
    const bool counts_here = in_table(id, ids_in_table);
    const unsigned same = __match_any_sync(kAll, counts_here ? unsigned(id) : unsigned(kIds));
    const int rank = __popc(same & ((1u << lane) - 1u));
    if (counts_here) order[own[id] + rank] = int(t);
    __syncwarp();
    if (counts_here && rank == 0) own[id] += __popc(same);
    __syncwarp();
  }
}

}  // namespace
}  // namespace mbk
