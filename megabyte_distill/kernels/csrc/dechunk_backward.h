// F4 backward: a block walks its bytes from the last to the first and collects what each chunk's readers hand back.
#pragma once
#include "dechunk_layout.h"
#include "dechunk_rows.h"

namespace mbk {
namespace {

constexpr int kPending = 32;  // bytes whose sums over the width a block collects between two barriers

template <class T>
struct BackwardRows {
  const T* dz;          // [P, width]
  const T* h;           // [M, width]
  const T* states;      // [M, width], null in hard mode
  const T* null_group;  // [width] or null
  T* dh;                // [M, width]
  float* d_confidence;  // [tiles, P] or null
  float* d_p;           // [tiles, P] or null
  float* null_sums;     // [blocks, width] or null
};

// Two sums over the width a byte, dz · read for its confidence and ds · (h - s) for its p, collected for a while.
struct Pending {
  float* values;  // [2][kPending][32 warps]
  int count = 0;
  int top;  // the byte whose sums come first; the others follow downwards
  static constexpr size_t kBytes = 2 * kPending * 32 * sizeof(float);

  __device__ __forceinline__ Pending(float* memory, int top) : values(memory), top(top) {}
  // The sums of the next `n` bytes downwards.
  __device__ __forceinline__ void add(const float (&reads)[4], const float (&ends)[4], int n) {
    const int lane = threadIdx.x & 31, g = lane >> 3, place = (count + g) * 32 + int(threadIdx.x >> 5);
    const float read = warp_sums_of_four(reads), end = warp_sums_of_four(ends);
    if ((lane & 7) == 0 && g < n) values[place] = read, values[kPending * 32 + place] = end;
    count += n;
  }
  __device__ __forceinline__ void flush(float* d_confidence, float* d_p) {
    __syncthreads();
    const int warps = int(blockDim.x) >> 5;
    for (int j = threadIdx.x; j < 2 * kPending; j += blockDim.x) {
      const int byte = j % kPending;
      float* const to = j < kPending ? d_confidence : d_p;
      if (byte >= count || !to) continue;
      float sum = 0.f;
      for (int w = 0; w < warps; ++w) sum += values[j * 32 + w];
      to[top - byte] = sum;
    }
    __syncthreads();
    top -= count, count = 0;
  }
};

// The gradient of the state of chunk first - 1 from all chunks behind: each byte's dz times the decays up to its chunk, the
// nearest first, until too little of it comes back.
template <class T, int64_t MODE>
__device__ __forceinline__ void warm_up_ahead(const Layout& at, const T* dz, int64_t first, int64_t width, Numbers& ds) {
  float kept = 1.f;
  for (int64_t base = first; base < at.chunks && kept >= kForgotten<T>; base += 32) {
    const int64_t m = base + (threadIdx.x & 31);
    const float product = product_so_far(m < at.chunks ? decay_of(at, m, MODE) : 0.f);
    const int count = first_lane(kept * product < kForgotten<T>);
    if (!count) return;
    const int64_t begin = __ldg(at.ends + base);
    const int64_t end = begin_of(at, base + count);
    for (int64_t from = begin; from < end; from += 32) {
      const int64_t t = from + (threadIdx.x & 31), chunk = t < end ? __ldg(at.chunk_of_byte + t) : -1;
      float factor = kept * __shfl_sync(kAll, product, int(max(chunk - base, int64_t(0))));
      if (chunk < base || (MODE == kCausal && __ldg(at.ends + chunk) == t)) factor = 0.f;  // reads nothing, or h
      add_rows(ds, dz, width, factor, int(min(int64_t(32), end - from)), [&](int i) { return from + i; });
    }
    if (count < 32) return;
    kept *= __shfl_sync(kAll, product, 31);
  }
}

// Blocks that a multiprocessor must have room for; 0 leaves it to ptxas. For sm_100 that of CUDA 13.0 holds one kernel to
// 80 registers, which spills.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
template <class T, int64_t MODE, bool SCALARS>
constexpr int kLeastBlocks = MODE == kHard && SCALARS && sizeof(T) == 4 ? 1 : 0;
#else
template <class T, int64_t MODE, bool SCALARS>
constexpr int kLeastBlocks = 0;
#endif

template <class T, int64_t MODE, bool SCALARS>
__global__ void __launch_bounds__(kThreads, kLeastBlocks<T, MODE, SCALARS>)
    dechunk_backward(Layout at, BackwardRows<T> rows, int64_t width, int span) {
  constexpr int R = kGroup<T>;
  constexpr bool kStates = MODE != kHard;
  unsigned char* memory = shared_memory<unsigned char>();
  const Run own(memory + Pending::kBytes, at, MODE, span);
  float ds[kVec];
  float aside[kVec];  // causal: dz of the byte that read h; official: of all that read null_group
  fill(ds, 0.f), fill(aside, 0.f);
  int i = int(own.end - own.first) - 1;
  for (int64_t m = at.chunks - 1 - blockIdx.x; m >= 0 && !is_real(at, m); m -= gridDim.x)
    store_row<T>(rows.dh, m, width, ds);  // padding
  const int lowest = blockIdx.x ? own.begins[0] : 0;
  int t = (i < 0 ? own.begins[0] : own.begins[i + 1]) - 1;
  if (kStates && own.end < at.chunks && i >= 0)
    warm_up_ahead<T, MODE>(at, rows.dz, own.end, width, ds);

  Row<T> h, state, before, next_h, next_before, ahead[R];
  const auto fetch_chunk = [&](int64_t m) {  // h of m, and the state in front of it
    if (SCALARS && m >= own.first) next_h.load(rows.h, m, width);
    if (SCALARS && kStates && m >= own.first && m > 0) next_before.load(rows.states, m - 1, width);
  };
  const auto fetch_bytes = [&](int from) {
#pragma unroll
    for (int r = 0; r < R; ++r)
      if (from - r >= lowest) ahead[r].load(rows.dz, from - r, width);
  };
  int stop = MODE == kOfficial && i >= 0 ? own.stops[i] : 0;
  fetch_bytes(t);
  fetch_chunk(own.first + i);
  if (SCALARS && kStates && i >= 0) state.load(rows.states, own.first + i, width);
  h = next_h, before = next_before;
  fetch_chunk(own.first + i - 1);
  Pending sums(reinterpret_cast<float*>(memory), t);
  float* const d_confidence = rows.d_confidence ? rows.d_confidence + blockIdx.y * at.bytes : nullptr;
  float* const d_p = rows.d_p ? rows.d_p + blockIdx.y * at.bytes : nullptr;
  for (; t >= lowest; t -= R) {
    Row<T> packed[R];
    float to_read[4] = {0.f, 0.f, 0.f, 0.f}, to_end[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int r = 0; r < R; ++r) packed[r] = ahead[r];
    fetch_bytes(t - R);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      if (t - r < lowest) break;
      float dz[kVec];
      fill(dz, 0.f);
      blend<T>(dz, 0.f, 1.f, packed[r]);
      const bool ends_chunk = i >= 0 && t - r == own.begins[i];
      if (i < 0 || (MODE == kOfficial && t - r >= stop)) {
        if (MODE == kOfficial) add(aside, dz);
        if (SCALARS && rows.null_group) {
          Row<T> null;
          null.load(rows.null_group, 0, width);
          to_read[r] = dot<T>(dz, null, width);
        }
      } else if (MODE == kCausal && ends_chunk) {
        add(aside, dz);
        if (SCALARS) to_read[r] = dot<T>(dz, h, width);
      } else {
        add(ds, dz);
        if (SCALARS) to_read[r] = dot<T>(dz, kStates ? state : h, width);
      }
      if (ends_chunk) {
        const int64_t m = own.first + i;
        float dh[kVec];
        fill(dh, 0.f);
        add(dh, ds);
        scale(dh, kStates ? own.weight[i] : 1.f);
        if (MODE == kCausal) add(dh, aside), fill(aside, 0.f);
        store_row<T>(rows.dh, m, width, dh);
        if (SCALARS && kStates && rows.d_p) {
          const float p = __ldg(at.p + t - r);
          const bool starts = at.starts[m], counts = p >= kClamp && p <= 1.f - kClamp && !(MODE == kCausal && starts);
          if (counts) to_end[r] = dot<T>(ds, h, width) - (starts ? 0.f : dot<T>(ds, before, width));
        }
        scale(ds, kStates ? own.decay[i] : 0.f);
        --i;
        if (MODE == kOfficial && i >= 0) stop = own.stops[i];
        h = next_h, state = before, before = next_before;
        fetch_chunk(m - 2);
      }
    }
    if (SCALARS) {
      sums.add(to_read, to_end, min(R, t - lowest + 1));
      if (sums.count + R > kPending) sums.flush(d_confidence, d_p);
    }
  }
  if (SCALARS) sums.flush(d_confidence, d_p);
  if (MODE == kOfficial && rows.null_sums) store_row<float>(rows.null_sums, blockIdx.x, width, aside);
}

// to[t] = sum of from[tile, t] over the tiles, in order.
__global__ void __launch_bounds__(256) add_tiles(const float* __restrict__ from, float* __restrict__ to, int64_t tiles, int64_t bytes) {
  const int64_t t = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (t >= bytes) return;
  float sum = 0.f;
  for (int64_t tile = 0; tile < tiles; ++tile) sum += from[tile * bytes + t];
  to[t] = sum;
}

}  // namespace
}  // namespace mbk
