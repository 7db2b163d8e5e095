// F4: where chunks lie among the bytes, what is left of a state from one to the next, and which of them a block has.
#pragma once
#include "kernel.h"

namespace mbk {
namespace {

enum Mode : int64_t { kHard, kCausal, kOfficial };

constexpr float kClamp = 1e-4f;  // as ops.P_CLAMP
constexpr int kMaxSpan = 512;    // bytes of a block, and so chunks that end in it

// The layout of a packed row: M chunks, the last of them perhaps padding, over P bytes.
struct Layout {
  const int64_t* ends;           // [M] last byte of a chunk; P - 1 for padding
  const int64_t* chunk_of_byte;  // [P] -1 before a segment's first end
  const uint8_t* starts;         // [M] first chunk of a segment, or of the padding
  const float* p;                // [P]
  int64_t chunks, bytes;
};

// No byte reads a padding chunk, not even the last one.
__device__ __forceinline__ bool is_real(const Layout& at, int64_t m) {
  return m < at.chunks && __ldg(at.chunk_of_byte + __ldg(at.ends + m)) == m;
}
// The first byte that reads chunk m; behind all bytes where m is padding.
__device__ __forceinline__ int64_t begin_of(const Layout& at, int64_t m) {
  return is_real(at, m) ? __ldg(at.ends + m) : at.bytes;
}
__device__ __forceinline__ float weight_of(const Layout& at, int64_t m, int64_t mode) {
  if (mode == kCausal && at.starts[m]) return 1.f;
  return min(max(__ldg(at.p + __ldg(at.ends + m)), kClamp), 1.f - kClamp);
}
// What is left of the state of m - 1 in that of m.
__device__ __forceinline__ float decay_of(const Layout& at, int64_t m, int64_t mode) {
  return at.starts[m] || !is_real(at, m) ? 0.f : 1.f - weight_of(at, m, mode);
}

// Factors of consecutive chunks in walking order, one a lane: their product up to and with the own lane.
__device__ __forceinline__ float product_so_far(float factor) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int offset = 1; offset < 32; offset <<= 1) {
    const float before = __shfl_up_sync(kAll, factor, offset);
    if (lane >= offset) factor *= before;
  }
  return factor;
}
// The first lane for which something holds, or 32.
__device__ __forceinline__ int first_lane(bool holds) {
  const unsigned hits = __ballot_sync(kAll, holds);
  return hits ? __ffs(int(hits)) - 1 : 32;
}

// Official mode: the first byte from ``begin``, where chunk m ends, up to ``end`` that no longer reads m, because its
// segment has no chunk yet.
__device__ __forceinline__ int64_t stop_of(const Layout& at, int64_t m, int64_t begin, int64_t end) {
  if (begin >= end || __ldg(at.chunk_of_byte + end - 1) == m) return end;
  while (begin + 1 < end) {
    const int64_t middle = (begin + end) / 2;
    (__ldg(at.chunk_of_byte + middle) == m ? begin : end) = middle;
  }
  return end;
}

// How many chunks end before ``byte``. Every warp alike.
__device__ __forceinline__ int64_t chunks_before(const Layout& at, int64_t byte) {
  if (byte == 0) return 0;
  const int64_t last = __ldg(at.chunk_of_byte + byte - 1);
  if (last >= 0) return last + 1;
  int64_t low = 0, high = at.chunks;  // the byte's segment has no chunk yet: 32 probes at a time
  while (low < high) {
    const int64_t step = ceil_div<int64_t>(high - low, 32), probe = low + ((threadIdx.x & 31) + 1) * step - 1;
    const int64_t hits = __popc(__ballot_sync(kAll, probe < high && is_real(at, probe) && __ldg(at.ends + probe) < byte));
    high = min(high, low + (hits + 1) * step - 1);
    low += hits * step;
  }
  return low;
}

// The scalars of a block's chunks [first, end), none of them padding, in shared memory. Where a chunk begins is read there
// when it is asked for: ptxas 13.0 makes begins[i - 2] of a copy that is kept in a register while i counts down.
struct Run {
  int* begins;    // [span + 1] first byte of a chunk; bytes [begins[i], begins[i + 1]) read it or nothing
  int* stops;     // [span] official: bytes [stops[i], begins[i + 1]) read nothing
  float* weight;  // [span]
  float* decay;   // [span]
  int64_t first, end;
  static constexpr size_t bytes_of(int64_t span) { return sizeof(int) * (2 * span + 1) + 2 * sizeof(float) * span; }

  __device__ __forceinline__ Run(unsigned char* memory, const Layout& at, int64_t mode, int span) {
    begins = reinterpret_cast<int*>(memory);
    stops = begins + span + 1;
    weight = reinterpret_cast<float*>(stops + span);
    decay = weight + span;
    const int64_t from = int64_t(blockIdx.x) * span;
    first = chunks_before(at, from), end = chunks_before(at, min(from + span, at.bytes));
    for (int64_t i = threadIdx.x; i <= end - first; i += blockDim.x) {
      const int64_t m = first + i, begin = begin_of(at, m);
      begins[i] = int(begin);
      if (m < end && mode == kOfficial) stops[i] = int(stop_of(at, m, begin, begin_of(at, m + 1)));
      if (m < end && mode != kHard) weight[i] = weight_of(at, m, mode), decay[i] = decay_of(at, m, mode);
    }
    __syncthreads();
  }
};

}  // namespace
}  // namespace mbk
