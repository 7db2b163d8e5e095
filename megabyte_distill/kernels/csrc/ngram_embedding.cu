// F1's second form: a byte's row plus its rows in tables of hashed n-grams, summed into an fp32 residual stream.
//
// Forward: a thread owns 8 channels of one byte and has all its rows in flight. Backward: the caller has sorted the rows of
// the n-gram table that are read; a warp walks a piece of that order and adds up the gradients of each row's bytes. Some
// rows are read by much of the text (unused bytes, common words), so pieces are of equal length, and what lies of one row
// in several is added up behind them, in order. Every gradient row is written once, zeros included. (The byte table's
// gradient is byte_embedding.cu's, which rounds each byte's gradient to the tables' dtype on the way, as torch's cast does.)
#include "kernel.h"

namespace mbk {
namespace {

constexpr int kForwardThreads = 64, kThreads = 128;
constexpr int kTables = 8;  // most there can be
constexpr int kWarps = kThreads / 32;
constexpr int kPartsRows = 16;  // of the table, that a block looks at for parts to add up
constexpr int kPiece = 128;     // places of the sorted order that a warp walks
template <class T>
constexpr int kInFlight = 16 / int(sizeof(T));  // rows whose loads are under way together: 128 bytes a thread

template <class T, int TABLES>
__global__ void __launch_bounds__(kForwardThreads) ngram_embedding_fwd(
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

// A warp's 32 * kVec columns of rows.
struct Tile {
  int64_t column, width;
  __device__ __forceinline__ Tile(int64_t first, int64_t width)
      : column(first + int64_t(threadIdx.x & 31) * kVec), width(width) {}
  template <class T>
  __device__ __forceinline__ void store(T* rows, int64_t row, const float (&sum)[kVec]) const {
    if (column < width) mbk::store(rows + row * width + column, sum);
  }
};
template <class T>
__device__ __forceinline__ void add(float (&sum)[kVec], const Packet<T>& packet) {
  float x[kVec];
  packet.unpack(x);
#pragma unroll
  for (int i = 0; i < kVec; ++i) sum[i] += x[i];
}
__device__ __forceinline__ int64_t warp_of_grid() { return int64_t(blockIdx.x) * kWarps + (threadIdx.x >> 5); }

// A warp walks one piece of the sorted places, in one tile of the width, and stores the sum of each row of the table: whole
// in d_ngram_table, or in parts [pieces, 2, width] what lies in this piece of a run that began before it (0) or goes on
// behind it (1). Tile after tile, since a cache of tens of megabytes holds that much of all bytes' gradients.
template <class T>
__global__ void __launch_bounds__(kThreads)
    ngram_sums(const T* __restrict__ d_stream, const int* __restrict__ sorted, const int64_t* __restrict__ order,
               float* __restrict__ parts, T* __restrict__ d_ngram_table, int places, int64_t ngram_rows, int64_t width,
               int tables) {
  constexpr int R = kInFlight<T>;
  const Tile tile(int64_t(blockIdx.y) * 32 * kVec, width);
  const int64_t piece = warp_of_grid(), first = piece * kPiece;
  if (first >= places) return;
  const int64_t end = min(first + kPiece, int64_t(places));
  const int before = first ? __ldg(sorted + first - 1) : -1, behind = end < places ? __ldg(sorted + end) : -1;
  const int last = __ldg(sorted + end - 1);
  float sum[kVec];
  fill(sum, 0.f);
  int current = __ldg(sorted + first);
  const auto finish = [&] {
    if (current < 0 || current >= ngram_rows) return;  // outside the table
    if (current == before || current == behind) tile.store(parts, piece * 2 + (current != before), sum);
    else tile.store(d_ngram_table, current, sum);
  };
  for (int64_t base = first; base < end; base += 32) {
    const int64_t place = base + (threadIdx.x & 31);
    const int my_row = place < end ? __ldg(sorted + place) : last;  // behind the end: zeros for the last row
    const int my_reader = place < end ? int(__ldg(order + place)) / tables : 0;
#pragma unroll 1
    for (int at = 0; at < 32 && base + at < end; at += R) {
      Packet<T> more[R];
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const int64_t reader = __shfl_sync(kAll, my_reader, at + r);
        more[r] = Packet<T>{};
        if (base + at + r < end && tile.column < width) more[r].load(d_stream + reader * width + tile.column);
      }
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const int row = __shfl_sync(kAll, my_row, at + r);
        if (row != current) {
          finish();
          fill(sum, 0.f);
          current = row;
        }
        add(sum, more[r]);
      }
    }
  }
  finish();
}

// runs[n] .. runs[n + 1]: the places of table row n. A block looks at kPartsRows rows, far from each other, since much-read
// ones stand together; its warps, a tile of the width each, add up the parts of those that lie in several pieces, and
// clear those that nobody reads.
template <class T>
__global__ void __launch_bounds__(kThreads, 5)
    ngram_parts(const int64_t* __restrict__ runs, const float* __restrict__ parts, T* __restrict__ d_ngram_table,
                int64_t ngram_rows, int64_t width) {
  constexpr int R = 8;
  const int lane = int(threadIdx.x & 31);  // the first half: where a row's places begin; the second: where they end
  const int64_t mine = blockIdx.x + int64_t(lane % kPartsRows) * gridDim.x;
  const int64_t place = __ldg(runs + min(mine + (lane >= kPartsRows), ngram_rows));
  for (int i = 0; i < kPartsRows; ++i) {
    const int64_t row = blockIdx.x + int64_t(i) * gridDim.x;
    const int64_t begins = __shfl_sync(kAll, place, i), ends = __shfl_sync(kAll, place, i + kPartsRows);
    const int64_t first = begins / kPiece, last = ends > begins ? (ends - 1) / kPiece : first - 1;
    if (row >= ngram_rows || first == last) continue;  // stored whole
    for (int64_t from = int64_t(threadIdx.x >> 5) * 32 * kVec; from < width; from += kWarps * 32 * kVec) {
      const Tile tile(from, width);
      float sum[kVec];
      fill(sum, 0.f);
#pragma unroll 1
      for (int64_t piece = first; piece <= last; piece += R) {
        Packet<float> more[R];
#pragma unroll
        for (int r = 0; r < R; ++r) {
          const int64_t at = piece + r;
          more[r] = Packet<float>{};
          if (at <= last && tile.column < width) more[r].load(parts + (at * 2 + (at == first)) * width + tile.column);
        }
#pragma unroll
        for (int r = 0; r < R; ++r) add(sum, more[r]);
      }
      tile.store(d_ngram_table, row, sum);
    }
  }
}

dim3 block_of(int64_t width) {
  return dim3(unsigned(min(ceil_div<int64_t>(width, 32 * kVec) * 32, int64_t(kForwardThreads))));
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
// d_stream: [rows, width] in the tables' dtype. sorted: [places], the rows of the table that are read, ascending; order:
// [places], which of all rows * tables indices these are. runs: [ngram_rows + 1]. parts: [ceil(places / 128), 2, width] fp32
// to work in. d_ngram_table: [ngram_rows, width].
MBK_API int mbk_ngram_embedding_backward(const void* d_stream, const int* sorted, const int64_t* order, const int64_t* runs,
                                         float* parts, void* d_ngram_table, int64_t width, int64_t places,
                                         int64_t ngram_rows, int64_t tables, int64_t dtype, void* stream) {
  using namespace mbk;
  if (const int code = refuse(width)) return code;
  if (places > INT32_MAX) return fail(kBadArgument, "n-gram embedding: more than 2^31 - 1 indices");
  if (ngram_rows == 0) return 0;
  return for_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    T* const sums = static_cast<T*>(d_ngram_table);
    const dim3 pieces(unsigned(ceil_div<int64_t>(places, kPiece * kWarps)), unsigned(ceil_div<int64_t>(width, 32 * kVec)));
    const int code = places == 0 ? 0 : launch(ngram_sums<T>, pieces, dim3(kThreads), 0, stream, static_cast<const T*>(d_stream),
                                              sorted, order, parts, sums, int(places), ngram_rows, width, int(tables));
    if (code) return code;
    return launch(ngram_parts<T>, dim3(unsigned(ceil_div<int64_t>(ngram_rows, kPartsRows))), dim3(kThreads), 0, stream, runs,
                  parts, sums, ngram_rows, width);
  });
}
