// F4: rows of states and bytes, a thread's columns of them, and sums of several.
#pragma once
#include "kernel.h"

namespace mbk {
namespace {

constexpr int kThreads = 256;  // of a block at most, kVec columns each

// A product of decays below this leaves nothing of a state: far less than a rounding of the dtype.
template <class T>
constexpr float kForgotten = sizeof(T) == 2 ? 1e-5f : 1e-8f;

// Byte rows a thread handles at once: 64 bytes, and as many on their way.
template <class T>
constexpr int kGroup = 64 / (kVec * int(sizeof(T)));

// This thread's columns of a row: the block has those of its tile of the width, the thread kVec of them.
template <class T>
struct Row {
  Packet<T> packet;
  static __device__ __forceinline__ int64_t column() {
    return (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * kVec;
  }
  // Leaves alone what lies behind the width.
  __device__ __forceinline__ void load(const T* rows, int64_t row, int64_t width) {
    if (column() < width) packet.load(rows + row * width + column());
  }
};
using Numbers = float[kVec];

template <class T>
__device__ __forceinline__ void store_row(T* rows, int64_t row, int64_t width, const Numbers& from) {
  if (Row<T>::column() < width) store(rows + row * width + Row<T>::column(), from);
}
// to = a * to + b * row
template <class T>
__device__ __forceinline__ void blend(Numbers& to, float a, float b, const Row<T>& row) {
  float x[kVec];
  row.packet.unpack(x);
#pragma unroll
  for (int i = 0; i < kVec; ++i) to[i] = fmaf(a, to[i], b * x[i]);
}
__device__ __forceinline__ void add(Numbers& to, const Numbers& x) {
#pragma unroll
  for (int i = 0; i < kVec; ++i) to[i] += x[i];
}
__device__ __forceinline__ void scale(Numbers& to, float by) {
#pragma unroll
  for (int i = 0; i < kVec; ++i) to[i] *= by;
}
// Sum of x * row over this thread's columns; what lies behind the width does not count.
template <class T>
__device__ __forceinline__ float dot(const Numbers& x, const Row<T>& row, int64_t width) {
  float y[kVec], sum = 0.f;
  row.packet.unpack(y);
#pragma unroll
  for (int i = 0; i < kVec; ++i) sum = fmaf(x[i], y[i], sum);
  return Row<T>::column() < width ? sum : 0.f;
}

// state += row * factor over `count` rows, the factor of row i in lane i; row(i) says which it is. Every warp alike.
template <class T, class Which>
__device__ __forceinline__ void add_rows(Numbers& state, const T* rows, int64_t width, float factor, int count, Which row) {
  constexpr int R = 2 * kGroup<T>;
  for (int i = 0; i < count; i += R) {
    Row<T> x[R];
    float by[R];
#pragma unroll
    for (int r = 0; r < R; ++r) {
      by[r] = __shfl_sync(kAll, factor, min(i + r, 31));
      if (i + r < count && by[r] != 0.f) x[r].load(rows, row(i + r), width);
    }
#pragma unroll
    for (int r = 0; r < R; ++r)
      if (i + r < count && by[r] != 0.f) blend<T>(state, 1.f, by[r], x[r]);
  }
}

}  // namespace
}  // namespace mbk
