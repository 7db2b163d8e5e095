// F2's data-dependent part: boundary bits, and from them counts, chunk index and chunk ranges of a packed row.
//
// Two launches (three with the bits) and no host sync: the outputs have room for the most chunks there can be, and the
// count stays on the device. The work is O(bytes) small integers, next to nothing beside one [P, E] tensor.
#include "kernel.h"

namespace mbk {
namespace {

constexpr int kThreads = 256;
constexpr int kItems = 8;  // consecutive bytes of the row a thread looks at
constexpr int kTile = kThreads * kItems;

__global__ void __launch_bounds__(kThreads) boundary_bits(
    const float* __restrict__ p, const int64_t* __restrict__ byte_ids, const uint8_t* __restrict__ is_text,
    uint8_t* __restrict__ bits, int64_t bytes, float threshold, int64_t start_byte) {
  const int64_t t = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (t >= bytes) return;
  // a run of what is not text is one chunk, whatever the router thinks of it
  bits[t] = !is_text || is_text[t] ? p[t] > threshold || byte_ids[t] == start_byte : t == 0 || is_text[t - 1];
}

// The ends in some stretch of the row: how many, and where the last one is (-1: nowhere).
struct Ends {
  int64_t count, last;
};
__device__ __forceinline__ Ends joined(Ends a, Ends b) { return {a.count + b.count, max(a.last, b.last)}; }

__device__ __forceinline__ Ends own_ends(const uint8_t* __restrict__ bits, int64_t first, int64_t bytes) {
  Ends own{0, -1};
#pragma unroll
  for (int i = 0; i < kItems; ++i)
    if (first + i < bytes && bits[first + i]) own.count += 1, own.last = first + i;
  return own;
}

__device__ __forceinline__ Ends from_lower_lane(Ends x, int distance) {
  return {__shfl_up_sync(kAll, x.count, distance), __shfl_up_sync(kAll, x.last, distance)};
}

// What the threads in front of this one hold, and the block's total; `shared` has an entry a warp.
__device__ __forceinline__ Ends in_front(Ends own, Ends* shared, Ends& total) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  Ends inclusive = own;
#pragma unroll
  for (int distance = 1; distance < 32; distance <<= 1) {
    const Ends lower = from_lower_lane(inclusive, distance);
    if (lane >= distance) inclusive = joined(lower, inclusive);
  }
  Ends front = from_lower_lane(inclusive, 1);
  if (lane == 0) front = {0, -1};
  __syncthreads();  // an earlier call may still be reading
  if (lane == 31) shared[warp] = inclusive;
  __syncthreads();
  total = {0, -1};
  for (int w = 0; w < kThreads / 32; ++w) {
    if (w == warp) front = joined(total, front);
    total = joined(total, shared[w]);
  }
  return front;
}

__device__ __forceinline__ int64_t first_item() { return int64_t(blockIdx.x) * kTile + threadIdx.x * kItems; }

__global__ void __launch_bounds__(kThreads) tile_ends(
    const uint8_t* __restrict__ bits, int64_t* __restrict__ counts, int64_t* __restrict__ lasts, int64_t bytes) {
  Ends total;
  in_front(own_ends(bits, first_item(), bytes), shared_memory<Ends>(), total);
  if (threadIdx.x == 0) counts[blockIdx.x] = total.count, lasts[blockIdx.x] = total.last;
}

// First index of cu[0..segments] whose entry is >= t.
__device__ __forceinline__ int64_t first_edge(const int* __restrict__ cu, int64_t segments, int64_t t) {
  int64_t low = 0, high = segments + 1;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (cu[middle] < t) low = middle + 1;
    else high = middle;
  }
  return low;
}

struct Layout {
  int64_t *ends, *begins, *chunk_of_byte;
  int* cu_chunks;
  uint8_t* starts;
  int64_t* count;
};

__global__ void __launch_bounds__(kThreads) chunk_index(
    const uint8_t* __restrict__ bits, const int* __restrict__ cu, const int64_t* __restrict__ counts,
    const int64_t* __restrict__ lasts, Layout out, int64_t bytes, int64_t segments, int64_t bucket, int64_t capacity) {
  Ends* shared = shared_memory<Ends>();
  Ends earlier{0, -1}, row{0, -1}, ignored;
  for (int tile = threadIdx.x; tile < int(gridDim.x); tile += kThreads) {
    const Ends its{counts[tile], lasts[tile]};
    row = joined(row, its);
    if (tile < int(blockIdx.x)) earlier = joined(earlier, its);
  }
  Ends all_earlier, all_row;
  in_front(earlier, shared, all_earlier);
  in_front(row, shared, all_row);
  const int64_t first = first_item();
  Ends seen = joined(all_earlier, in_front(own_ends(bits, first, bytes), shared, ignored));

  if (first < bytes) {
    int64_t edge = first_edge(cu, segments, first);
    for (int64_t t = first; t < min(first + kItems, bytes); ++t) {
      for (; edge <= segments && cu[edge] == t; ++edge) out.cu_chunks[edge] = int(seen.count);
      const int64_t segment_start = cu[edge - 1];
      if (bits[t]) {
        out.ends[seen.count] = t;
        out.begins[seen.count] = max(seen.last + 1, segment_start);
        out.starts[seen.count] = seen.last < segment_start;
        seen = {seen.count + 1, t};
      }
      out.chunk_of_byte[t] = seen.last < segment_start ? -1 : seen.count - 1;
    }
    if (first + kItems >= bytes)
      for (; edge <= segments; ++edge) out.cu_chunks[edge] = int(seen.count);
  }
  // behind the last chunk: padding, one dummy segment
  const int64_t worker = int64_t(blockIdx.x) * kThreads + threadIdx.x, workers = int64_t(gridDim.x) * kThreads;
  for (int64_t m = all_row.count + worker; m < capacity; m += workers)
    out.ends[m] = bytes - 1, out.begins[m] = bytes, out.starts[m] = m == all_row.count;
  if (worker == 0) {
    *out.count = all_row.count;
    out.cu_chunks[segments + 1] = int((all_row.count + bucket - 1) / bucket * bucket);
  }
}

}  // namespace
}  // namespace mbk

// p, byte_ids, bits: [bytes]; is_text: [bytes], or null where all is text. A byte that equals start_byte is an end; -1 for none.
MBK_API int mbk_boundary_bits(const float* p, const int64_t* byte_ids, const uint8_t* is_text, uint8_t* bits,
                              int64_t bytes, double threshold, int64_t start_byte, void* stream) {
  using namespace mbk;
  if (bytes == 0) return 0;
  return launch(boundary_bits, unsigned(ceil_div<int64_t>(bytes, kThreads)), kThreads, 0, stream, p, byte_ids, is_text,
                bits, bytes, float(threshold), start_byte);
}

// bits: [bytes], at least one byte. cu: [segments + 1]. work: 2 · ceil(bytes / 2048) numbers. ends, begins, starts:
// [capacity], the bytes rounded up to the bucket. cu_chunks: [segments + 2]. count: [1].
MBK_API int mbk_chunk_index(const uint8_t* bits, const int* cu, int64_t* work, int64_t* ends, int64_t* begins,
                             int64_t* chunk_of_byte, int* cu_chunks, uint8_t* starts, int64_t* count, int64_t bytes,
                             int64_t segments, int64_t bucket, int64_t capacity, void* stream) {
  using namespace mbk;
  const int64_t tiles = ceil_div<int64_t>(bytes, kTile);
  const size_t shared = kThreads / 32 * sizeof(Ends);
  const Layout out{ends, begins, chunk_of_byte, cu_chunks, starts, count};
  if (const int error = launch(tile_ends, unsigned(tiles), kThreads, shared, stream, bits, work, work + tiles, bytes))
    return error;
  return launch(chunk_index, unsigned(tiles), kThreads, shared, stream, bits, cu, work, work + tiles, out, bytes,
                segments, bucket, capacity);
}
