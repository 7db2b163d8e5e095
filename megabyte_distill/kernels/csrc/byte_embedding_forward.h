// F1 forward: bytes take their rows, as they are, normed before or normed here.
#pragma once
#include "byte_embedding_rows.h"

namespace mbk {
namespace {

constexpr int kGatherRows = 2;  // of a block that gathers

// out[t] = table[ids[t]] + added[t]; NaN for an id outside the table, so that it is seen.
template <class T, class Out, bool ADDED>
__global__ void __launch_bounds__(kFlatThreads)
    gather_rows(const int64_t* __restrict__ ids, const T* __restrict__ table, const T* __restrict__ added,
                Out* __restrict__ out, int64_t rows, int64_t width, int64_t ids_in_table) {
  constexpr int N = kNumbers<Out>;
  const int64_t first = int64_t(blockIdx.x) * kGatherRows, column = flat_column<N>();
  if (column >= width) return;
  float x[kGatherRows][N], more[kGatherRows][N];
#pragma unroll
  for (int r = 0; r < kGatherRows; ++r) {
    const int64_t row = first + r, id = row < rows ? __ldg(ids + row) : -1;
#pragma unroll
    for (int i = 0; i < N; ++i) x[r][i] = nan(), more[r][i] = 0.f;
    if (ADDED && row < rows) load_some(added + row * width + column, more[r]);
    if (in_table(id, ids_in_table)) load_some(table + id * width + column, x[r]);
  }
#pragma unroll
  for (int r = 0; r < kGatherRows; ++r) {
#pragma unroll
    for (int i = 0; i < N; ++i) x[r][i] += more[r][i];
    if (first + r < rows) store_streaming(out + (first + r) * width + column, x[r]);
  }
}

// A block a row of the table: normed[id] = table[id] * scale[id] * weight.
template <class T>
__global__ void __launch_bounds__(kFlatThreads)
    norm_table(const T* __restrict__ table, const T* __restrict__ weight, T* __restrict__ normed,
               float* __restrict__ scale, int64_t width, float eps) {
  BlockSums<1> total{shared_memory<float>()};
  const T* const row = table + blockIdx.x * width;
  float x[kVec], squares[1] = {0.f};
  for (int64_t column = threadIdx.x * kVec; column < width; column += blockDim.x * kVec) {
    load(row + column, x);
#pragma unroll
    for (int i = 0; i < kVec; ++i) squares[0] = fmaf(x[i], x[i], squares[0]);
  }
  total(squares);
  const float rms = rsqrtf(squares[0] / float(width) + eps);
  if (threadIdx.x == 0) scale[blockIdx.x] = rms;
  for (int64_t column = threadIdx.x * kVec; column < width; column += blockDim.x * kVec) {
    float w[kVec];
    load(row + column, x), load(weight + column, w);
#pragma unroll
    for (int i = 0; i < kVec; ++i) x[i] *= rms * w[i];
    store(normed + blockIdx.x * width + column, x);
  }
}

template <class T, int PASSES>
__global__ void __launch_bounds__(kRowThreads, 1)
    norm_sums_forward(const int64_t* __restrict__ ids, const T* __restrict__ table, const T* __restrict__ added,
                      const T* __restrict__ weight, float* __restrict__ stream, T* __restrict__ normed,
                      float* __restrict__ scale, int64_t rows, int64_t width, int64_t ids_in_table, float eps) {
  constexpr int R = kNormRows<PASSES>;
  BlockSums<R> total{shared_memory<float>()};
  const int64_t first = int64_t(blockIdx.x) * kNormRowsPerBlock, end = min(first + kNormRowsPerBlock, rows);
  for (int64_t row = first; row < end; row += R) {
    float x[R][PASSES][kVec], squares[R];
#pragma unroll
    for (int r = 0; r < R; ++r) {
      squares[r] = 0.f;
#pragma unroll
      for (int k = 0; k < PASSES; ++k) {
        const int column = (k * blockDim.x + threadIdx.x) * kVec;
        fill(x[r][k], 0.f);
        if (row + r < end && column < width)
          load_sum(table, added, __ldg(ids + row + r), ids_in_table, row + r, width, column, x[r][k]);
#pragma unroll
        for (int i = 0; i < kVec; ++i) squares[r] = fmaf(x[r][k][i], x[r][k][i], squares[r]);
      }
    }
    total(squares);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      if (row + r >= end) break;
      const float rms = rsqrtf(squares[r] / float(width) + eps);
      if (threadIdx.x == 0) scale[row + r] = rms;
#pragma unroll
      for (int k = 0; k < PASSES; ++k) {
        const int column = (k * blockDim.x + threadIdx.x) * kVec;
        if (column >= width) break;
        if (stream) store(stream + (row + r) * width + column, x[r][k]);
        float w[kVec];
        load(weight + column, w);
#pragma unroll
        for (int i = 0; i < kVec; ++i) w[i] *= x[r][k][i] * rms;
        store(normed + (row + r) * width + column, w);
      }
    }
  }
}

}  // namespace
}  // namespace mbk
