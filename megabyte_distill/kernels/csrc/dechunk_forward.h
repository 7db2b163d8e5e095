// F4 forward: a block walks its bytes with the state of the chunk that they read; in hard mode, where no state passes from
// chunk to chunk, each byte reads its chunk's row.
#pragma once
#include "dechunk_layout.h"
#include "dechunk_rows.h"

namespace mbk {
namespace {

template <class T>
struct ForwardRows {
  const T* h;           // [M, width]
  const T* residual;    // [P, width]
  const T* null_group;  // [width] or null: NaN is read in its place
  T* z;                 // [P, width]
  T* states;            // [M, width] or null
};

// Bytes a thread of hard mode handles, whose loads are under way together.
constexpr int kHardRows = 2;

template <class T>
__global__ void __launch_bounds__(kThreads)
    dechunk_hard_forward(const int64_t* __restrict__ chunk_of_byte, ForwardRows<T> rows, int64_t bytes, int64_t width) {
  const int64_t first = int64_t(blockIdx.x) * kHardRows;
  Row<T> h[kHardRows], residual[kHardRows];
  int64_t chunk[kHardRows];
#pragma unroll
  for (int r = 0; r < kHardRows; ++r) {
    chunk[r] = first + r < bytes ? __ldg(chunk_of_byte + first + r) : -1;
    if (first + r < bytes) residual[r].load(rows.residual, first + r, width);
    if (chunk[r] >= 0) h[r].load(rows.h, chunk[r], width);
  }
#pragma unroll
  for (int r = 0; r < kHardRows; ++r) {
    if (first + r >= bytes) break;
    float z[kVec];
    fill(z, chunk[r] < 0 ? nan() : 0.f);
    if (chunk[r] >= 0) blend<T>(z, 0.f, 1.f, h[r]);
    blend<T>(z, 1.f, 1.f, residual[r]);
    store_row<T>(rows.z, first + r, width, z);
  }
}

// The state in front of chunk `first`: the chunks before it, the nearest first, until too little is left of them in `first`.
template <class T, int64_t MODE>
__device__ __forceinline__ void warm_up(const Layout& at, const T* h, int64_t first, int64_t width, Numbers& state) {
  float kept = 1.f, left = first > 0 ? decay_of(at, first, MODE) : 0.f;  // of chunk base + 1's state; of base's in `first`
  for (int64_t base = first - 1; left >= kForgotten<T>; base -= 32) {
    const int64_t m = base - (threadIdx.x & 31);
    const float product = product_so_far(m > 0 ? decay_of(at, m, MODE) : 0.f);
    const float before = __shfl_up_sync(kAll, product, 1);
    const float factor = m < 0 ? 0.f : kept * ((threadIdx.x & 31) ? before : 1.f) * weight_of(at, m, MODE);
    const int count = min(32, first_lane(left * product < kForgotten<T>) + 1);
    add_rows(state, h, width, factor, count, [&](int i) { return base - i; });
    const float all = __shfl_sync(kAll, product, 31);
    kept *= all, left *= all;
  }
}

template <class T, int64_t MODE>
__global__ void __launch_bounds__(kThreads) dechunk_forward(Layout at, ForwardRows<T> rows, int64_t width, int span) {
  constexpr int R = kGroup<T>;
  const Run own(shared_memory<unsigned char>(), at, MODE, span);
  const int count = int(own.end - own.first);
  float state[kVec];
  fill(state, 0.f);
  if (count > 0) warm_up<T, MODE>(at, rows.h, own.first, width, state);
  int t = blockIdx.x ? own.begins[0] : 0;  // the bytes in front of all chunks are the first block's
  const int end = own.begins[max(count, 0)];
  int i = -1, stop = t, next_begin = own.begins[0];
  Row<T> h, next_h, ahead[R];
  const auto fetch = [&](int from) {
#pragma unroll
    for (int r = 0; r < R; ++r)
      if (from + r < end) ahead[r].load(rows.residual, from + r, width);
  };
  if (next_begin < end) next_h.load(rows.h, own.first, width);
  fetch(t);
  for (; t < end; t += R) {
    Row<T> residual[R];
#pragma unroll
    for (int r = 0; r < R; ++r) residual[r] = ahead[r];
    fetch(t + R);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      if (t + r >= end) break;
      if (t + r == next_begin) {  // here a chunk ends, and its state begins to be read
        ++i;
        h = next_h;
        next_begin = own.begins[i + 1];
        if (MODE == kOfficial) stop = own.stops[i];
        if (next_begin < end) next_h.load(rows.h, own.first + i + 1, width);
        blend<T>(state, own.decay[i], own.weight[i], h);
        if (rows.states) store_row<T>(rows.states, own.first + i, width, state);
      }
      float z[kVec];
      if (i < 0 || (MODE == kOfficial && t + r >= stop)) {
        fill(z, rows.null_group ? 0.f : nan());
        if (rows.null_group) {
          Row<T> null;
          null.load(rows.null_group, 0, width);
          blend<T>(z, 0.f, 1.f, null);
        }
      } else if (MODE == kCausal && t + r == own.begins[i]) {
        fill(z, 0.f);
        blend<T>(z, 0.f, 1.f, h);
      } else {
        fill(z, 0.f);
        add(z, state);
      }
      blend<T>(z, 1.f, 1.f, residual[r]);
      store_row<T>(rows.z, t + r, width, z);
    }
  }
}

}  // namespace
}  // namespace mbk
