// F1's second form: a byte's row plus its rows in tables of hashed n-grams, summed into an fp32 residual stream.
//
// Forward: a thread owns 8 channels of one byte and has all its rows in flight. Backward: a block owns one row of the
// n-gram table and adds up the bytes that read it, in order; the caller has sorted them. Every gradient row is written
// once, zeros included. (The byte table's gradient is byte_embedding.cu's.)
#include "kernel.h"

namespace mbk {
namespace {

constexpr int kThreads = 128;
constexpr int kTables = 8;  // most there can be
constexpr int kUnroll = 4;

template <class T>
__global__ void __launch_bounds__(kThreads, 1) ngram_embedding_fwd(
    const int64_t* __restrict__ byte_ids, const int64_t* __restrict__ indices, const T* __restrict__ table,
    const T* __restrict__ ngram_table, float* __restrict__ stream, int64_t width, int64_t vocabulary, int64_t ngram_rows,
    int tables) {
  const int64_t at = (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * kVec, row = blockIdx.x;
  if (at >= width) return;
  const int64_t id = byte_ids[row];
  bool inside = id >= 0 && id < vocabulary;
  float sum[kVec], more[kTables][kVec];
#pragma unroll
  for (int k = 0; k < kTables; ++k) {
    if (k >= tables) continue;
    const int64_t index = indices[row * tables + k];
    const bool known = index >= 0 && index < ngram_rows;
    if (known) load(ngram_table + index * width + at, more[k]);
    inside = inside && known;
  }
  if (inside) {
    load(table + id * width + at, sum);
#pragma unroll
    for (int k = 0; k < kTables; ++k) {
      if (k >= tables) continue;
#pragma unroll
      for (int i = 0; i < kVec; ++i) sum[i] += more[k][i];
    }
  } else {
    fill(sum, NAN);
  }
  store(stream + row * width + at, sum);
}

// order: places in indices [rows * tables], sorted by what stands there; runs[n] .. runs[n + 1]: those of table row n.
template <class T>
__global__ void __launch_bounds__(kThreads, 1) ngram_embedding_bwd(
    const float* __restrict__ d_stream, const int64_t* __restrict__ order, const int64_t* __restrict__ runs,
    T* __restrict__ d_ngram_table, int64_t width, int tables) {
  const int64_t at = (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * kVec, row = blockIdx.x;
  if (at >= width) return;
  const int64_t end = runs[row + 1];
  float sum[kVec];
  fill(sum, 0.f);
  for (int64_t place = runs[row]; place < end; place += kUnroll) {
    float more[kUnroll][kVec];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) load(d_stream + order[min(place + u, end - 1)] / tables * width + at, more[u]);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (place + u >= end) break;
#pragma unroll
      for (int i = 0; i < kVec; ++i) sum[i] += more[u][i];
    }
  }
  store(d_ngram_table + row * width + at, sum);
}

dim3 block_of(int64_t width) {
  return dim3(unsigned(min(ceil_div<int64_t>(width, 32 * kVec) * 32, int64_t(kThreads))));
}
dim3 grid_of(int64_t rows, int64_t width) {
  return dim3(unsigned(rows), unsigned(ceil_div<int64_t>(width / kVec, block_of(width).x)));
}
int bad_shape(int64_t width, int64_t tables) {
  if (width > 0 && width % kVec == 0 && tables > 0 && tables <= kTables) return 0;
  return fail(kBadArgument, "n-gram embedding: needs a width that is a multiple of 8 and 1 to 8 tables");
}

}  // namespace
}  // namespace mbk

// byte_ids: [rows]. indices: [rows, tables]. table: [vocabulary, width]. ngram_table: [ngram_rows, width].
// stream: [rows, width] fp32; NaN where an id or an index is outside its table.
MBK_API int mbk_ngram_embedding_forward(const int64_t* byte_ids, const int64_t* indices, const void* table,
                                        const void* ngram_table, float* residual_stream, int64_t rows, int64_t width,
                                        int64_t vocabulary, int64_t ngram_rows, int64_t tables, int64_t dtype,
                                        void* stream) {
  using namespace mbk;
  if (const int bad = bad_shape(width, tables)) return bad;
  if (rows == 0) return 0;
  return for_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    return launch(ngram_embedding_fwd<T>, grid_of(rows, width), block_of(width), 0, stream, byte_ids, indices,
                  static_cast<const T*>(table), static_cast<const T*>(ngram_table), residual_stream, width, vocabulary,
                  ngram_rows, int(tables));
  });
}
// d_stream: [rows, width] fp32. order: [rows * tables]. runs: [ngram_rows + 1]. d_ngram_table: [ngram_rows, width].
MBK_API int mbk_ngram_embedding_backward(const float* d_stream, const int64_t* order, const int64_t* runs,
                                         void* d_ngram_table, int64_t width, int64_t ngram_rows, int64_t tables,
                                         int64_t dtype, void* stream) {
  using namespace mbk;
  if (const int bad = bad_shape(width, tables)) return bad;
  if (ngram_rows == 0) return 0;
  return for_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    return launch(ngram_embedding_bwd<T>, grid_of(ngram_rows, width), block_of(width), 0, stream, d_stream, order, runs,
                  static_cast<T*>(d_ngram_table), width, int(tables));
  });
}
