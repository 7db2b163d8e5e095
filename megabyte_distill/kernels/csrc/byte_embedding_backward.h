// F1 backward through the norm: of the table's rows, whose gradients are summed by id, or of every byte's own row.
#pragma once
#include "byte_embedding_rows.h"

namespace mbk {
namespace {

// A block a row of the table, whose bytes' gradients are summed: of the stream (or null), of the normed rows.
template <class T>
__global__ void __launch_bounds__(kFlatThreads)
    norm_table_backward(const float* __restrict__ d_stream, const float* __restrict__ d_normed,
                        const T* __restrict__ table, const T* __restrict__ weight, const float* __restrict__ scale,
                        T* __restrict__ d_table, float* __restrict__ norm_sums, int64_t width) {
  BlockSums<1> total{shared_memory<float>()};
  const int64_t row = blockIdx.x * width;
  const float rms = scale[blockIdx.x];
  float along[1] = {0.f}, x[kVec], dy[kVec], w[kVec];
  for (int64_t column = threadIdx.x * kVec; column < width; column += blockDim.x * kVec) {
    load(table + row + column, x), load(d_normed + row + column, dy), load(weight + column, w);
    float product[kVec];
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      x[i] *= rms;
      product[i] = dy[i] * x[i];
      along[0] = fmaf(product[i], w[i], along[0]);
    }
    if (norm_sums) store(norm_sums + row + column, product);
  }
  total(along);
  if (!d_table) return;
  const float share = along[0] / float(width);
  for (int64_t column = threadIdx.x * kVec; column < width; column += blockDim.x * kVec) {
    float more[kVec];
    fill(more, 0.f);
    load(table + row + column, x), load(d_normed + row + column, dy), load(weight + column, w);
    if (d_stream) load(d_stream + row + column, more);
#pragma unroll
    for (int i = 0; i < kVec; ++i) more[i] += rms * (dy[i] * w[i] - share * x[i] * rms);
    store(d_table + row + column, more);
  }
}

// With an added state: dx [rows, width] in fp32 for the sums by id, d_added, and the weight's sums of each block.
template <class T, int PASSES>
__global__ void __launch_bounds__(kRowThreads, 1)
    norm_sums_backward(const float* __restrict__ d_stream, const T* __restrict__ d_normed, const int64_t* __restrict__ ids,
                       const T* __restrict__ table, const T* __restrict__ added, const T* __restrict__ weight,
                       const float* __restrict__ scale, float* __restrict__ dx_out, T* __restrict__ d_added,
                       float* __restrict__ norm_sums, int64_t rows, int64_t width, int64_t ids_in_table, int piece) {
  constexpr int R = kNormRows<PASSES>;
  BlockSums<R> total{shared_memory<float>()};
  const int64_t first = int64_t(blockIdx.x) * piece, end = min(first + piece, rows);
  float norm[PASSES][kVec];
#pragma unroll
  for (int k = 0; k < PASSES; ++k) fill(norm[k], 0.f);
  for (int64_t row = first; row < end; row += R) {
    float dx[R][PASSES][kVec], x[R][PASSES][kVec], along[R];
#pragma unroll
    for (int r = 0; r < R; ++r) {
      along[r] = 0.f;
#pragma unroll
      for (int k = 0; k < PASSES; ++k) {
        const int column = (k * blockDim.x + threadIdx.x) * kVec;
        fill(dx[r][k], 0.f), fill(x[r][k], 0.f);
        if (row + r >= end || column >= width) continue;
        float dy[kVec], w[kVec];
        if (d_stream) load(d_stream + (row + r) * width + column, dx[r][k]);
        load(d_normed + (row + r) * width + column, dy), load(weight + column, w);
        load_sum(table, added, __ldg(ids + row + r), ids_in_table, row + r, width, column, x[r][k]);
        const float rms = __ldg(scale + row + r);
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
          x[r][k][i] *= rms;
          norm[k][i] = fmaf(dy[i], x[r][k][i], norm[k][i]);
          w[i] *= dy[i];
          along[r] = fmaf(w[i], x[r][k][i], along[r]);
          dx[r][k][i] = fmaf(w[i], rms, dx[r][k][i]);
        }
      }
    }
    total(along);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      if (row + r >= end) break;
      const float share = along[r] / float(width) * __ldg(scale + row + r);
#pragma unroll
      for (int k = 0; k < PASSES; ++k) {
        const int column = (k * blockDim.x + threadIdx.x) * kVec;
        if (column >= width) break;
#pragma unroll
        for (int i = 0; i < kVec; ++i) dx[r][k][i] = fmaf(-share, x[r][k][i], dx[r][k][i]);
        if (dx_out) store(dx_out + (row + r) * width + column, dx[r][k]);
        if (d_added) store(d_added + (row + r) * width + column, dx[r][k]);
      }
    }
  }
#pragma unroll
  for (int k = 0; k < PASSES; ++k) {
    const int column = (k * blockDim.x + threadIdx.x) * kVec;
    if (norm_sums && column < width) store(norm_sums + int64_t(blockIdx.x) * width + column, norm[k]);
  }
}

}  // namespace
}  // namespace mbk
