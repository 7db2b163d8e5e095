// F1's second form: a byte's row plus its rows in tables of hashed n-grams, summed into an fp32 residual stream.
//
// Forward: a thread owns 8 channels of one byte and has all its rows in flight. Backward: a block owns one row of the
// n-gram table and adds up the bytes that read it, in order; the caller has sorted them. Some rows are read by much of
// the text (unused bytes, common words): where one row has a whole piece of the order to itself, another block has
// added that piece up before. Every gradient row is written once, zeros included. (The byte table's gradient is
// byte_embedding.cu's.)
#include "kernel.h"

namespace mbk {
namespace {

constexpr int kThreads = 128;
constexpr int kTables = 8;  // most there can be
constexpr int kUnroll = 4;
constexpr int kPiece = 64;  // places of the sorted order that a block adds up for a row that has them all

template <class T, int TABLES>
__global__ void __launch_bounds__(kThreads) ngram_embedding_fwd(
    const int64_t* __restrict__ byte_ids, const int64_t* __restrict__ indices, const T* __restrict__ table,
    const T* __restrict__ ngram_table, float* __restrict__ stream, int64_t width, int64_t vocabulary, int64_t ngram_rows) {
  const int64_t at = (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * kVec, row = blockIdx.x;
  if (at >= width) return;
  // all indices before the first row, and no branch between the rows: everything is in flight at once
  int64_t id = __ldg(byte_ids + row), index[TABLES];
#pragma unroll
  for (int k = 0; k < TABLES; ++k) index[k] = __ldg(indices + row * TABLES + k);
  bool inside = id >= 0 && id < vocabulary;
  if (!inside) id = 0;
#pragma unroll
  for (int k = 0; k < TABLES; ++k) {
    const bool known = index[k] >= 0 && index[k] < ngram_rows;
    if (!known) index[k] = 0;
    inside = inside && known;
  }
  float sum[kVec], more[TABLES][kVec];
  load(table + id * width + at, sum);
#pragma unroll
  for (int k = 0; k < TABLES; ++k) load(ngram_table + index[k] * width + at, more[k]);
#pragma unroll
  for (int k = 0; k < TABLES; ++k)
#pragma unroll
    for (int i = 0; i < kVec; ++i) sum[i] += more[k][i];
  if (!inside) fill(sum, NAN);
  store_streaming(stream + row * width + at, sum);
}

// sum += the rows of d_stream that readers[first .. end) names.
__device__ __forceinline__ void add_rows(const float* __restrict__ d_stream, const int64_t* __restrict__ readers,
                                         int64_t first, int64_t end, int64_t width, int64_t at, float (&sum)[kVec]) {
  for (int64_t place = first; place < end; place += kUnroll) {
    int64_t from[kUnroll];
    float more[kUnroll][kVec];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) from[u] = readers[min(place + u, end - 1)];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) load(d_stream + from[u] * width + at, more[u]);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (place + u >= end) break;
#pragma unroll
      for (int i = 0; i < kVec; ++i) sum[i] += more[u][i];
    }
  }
}

// pieces[n] = the sum over readers[n * kPiece .. (n + 1) * kPiece) where one row of the table has all of it.
__global__ void __launch_bounds__(kThreads, 1) ngram_embedding_pieces(
    const float* __restrict__ d_stream, const int64_t* __restrict__ readers, const int* __restrict__ sorted,
    float* __restrict__ pieces, int64_t width) {
  const int64_t at = (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * kVec, first = int64_t(blockIdx.x) * kPiece;
  if (at >= width || sorted[first] != sorted[first + kPiece - 1]) return;
  float sum[kVec];
  fill(sum, 0.f);
  add_rows(d_stream, readers, first, first + kPiece, width, at, sum);
  store(pieces + blockIdx.x * width + at, sum);
}

// runs[n] .. runs[n + 1]: the readers of table row n.
template <class T>
__global__ void __launch_bounds__(kThreads, 1) ngram_embedding_bwd(
    const float* __restrict__ d_stream, const int64_t* __restrict__ readers, const int64_t* __restrict__ runs,
    const float* __restrict__ pieces, T* __restrict__ d_ngram_table, int64_t width) {
  const int64_t at = (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * kVec, row = blockIdx.x;
  if (at >= width) return;
  const int64_t first = runs[row], end = runs[row + 1];
  const int64_t first_piece = (first + kPiece - 1) / kPiece, end_piece = end / kPiece;
  float sum[kVec];
  fill(sum, 0.f);
  if (first_piece >= end_piece) {
    add_rows(d_stream, readers, first, end, width, at, sum);
  } else {
    add_rows(d_stream, readers, first, first_piece * kPiece, width, at, sum);
    for (int64_t piece = first_piece; piece < end_piece; piece += kUnroll) {
      float more[kUnroll][kVec];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) load(pieces + min(piece + u, end_piece - 1) * width + at, more[u]);
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (piece + u >= end_piece) break;
#pragma unroll
        for (int i = 0; i < kVec; ++i) sum[i] += more[u][i];
      }
    }
    add_rows(d_stream, readers, end_piece * kPiece, end, width, at, sum);
  }
  store(d_ngram_table + row * width + at, sum);
}

dim3 block_of(int64_t width) {
  return dim3(unsigned(min(ceil_div<int64_t>(width, 32 * kVec) * 32, int64_t(kThreads))));
}
dim3 grid_of(int64_t rows, int64_t width) {
  return dim3(unsigned(rows), unsigned(ceil_div<int64_t>(width / kVec, block_of(width).x)));
}
// f(integral_constant<int, TABLES>) for a number of tables.
template <int TABLES = 1, class F>
int for_tables(int64_t tables, F f) {
  if (tables == TABLES) return f(std::integral_constant<int, TABLES>{});
  if constexpr (TABLES < kTables) return for_tables<TABLES + 1>(tables, f);
  return fail(kBadArgument, "n-gram embedding: needs 1 to 8 tables");
}
int refuse(int64_t width) {
  return width > 0 && width % kVec == 0 ? 0 : fail(kBadArgument, "n-gram embedding: needs a width that is a multiple of 8");
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
  if (const int code = refuse(width)) return code;
  if (rows == 0) return 0;
  return for_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    return for_tables(tables, [&](auto count) {
      return launch(ngram_embedding_fwd<T, decltype(count)::value>, grid_of(rows, width), block_of(width), 0, stream, byte_ids,
                    indices, static_cast<const T*>(table), static_cast<const T*>(ngram_table), residual_stream, width,
                    vocabulary, ngram_rows);
    });
  });
}
// d_stream: [rows, width] fp32. sorted: [places], the rows of the table that are read, ascending; readers: [places], the
// bytes that read them. runs: [ngram_rows + 1]. pieces: [places / 64, width] fp32 to work in. d_ngram_table: [ngram_rows,
// width].
MBK_API int mbk_ngram_embedding_backward(const float* d_stream, const int* sorted, const int64_t* readers,
                                         const int64_t* runs, float* pieces, void* d_ngram_table, int64_t width,
                                         int64_t places, int64_t ngram_rows, int64_t dtype, void* stream) {
  using namespace mbk;
  if (const int code = refuse(width)) return code;
  if (ngram_rows == 0) return 0;
  if (places >= kPiece)
    if (const int error = launch(ngram_embedding_pieces, grid_of(places / kPiece, width), block_of(width), 0, stream,
                                 d_stream, readers, sorted, pieces, width))
      return error;
  return for_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    return launch(ngram_embedding_bwd<T>, grid_of(ngram_rows, width), block_of(width), 0, stream, d_stream, readers,
                  runs, pieces, static_cast<T*>(d_ngram_table), width);
  });
}
