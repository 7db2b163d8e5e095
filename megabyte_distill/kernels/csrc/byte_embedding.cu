// F1: rows of a byte table, plus a state that is there already, then RMSNorm; and all its gradients.
//
//   x_t = table[id_t] + added_t          kept in fp32, the residual stream, if the caller wants it
//   y_t = x_t * scale_t * weight         scale_t = 1 / sqrt(mean(x_t^2) + eps)
//
// A block holds whole rows, several at once, so that their loads are in flight together and one barrier serves the norms
// of all. The table's gradient sums rows by id without atomics: the caller sorts the ids; a block walks one piece of the
// sorted order and keeps the sum of the current id in registers. A run of equal ids inside a piece is finished there,
// one that crosses pieces leaves a partial sum in each, and a second kernel adds those up in order.
#include "kernel.h"

namespace mbk {
namespace {

constexpr int kRowsPerBlock = 16;  // of the forward pass

// Rows a block has in flight; the norm's gradient holds twice the numbers of each.
template <int PASSES, bool NORM_GRADIENT>
constexpr int kRows = (NORM_GRADIENT ? 2 : 4) / PASSES;

// x = table[id] + added at (row, column); NaN for an id outside the table, so that it is seen.
template <class T, bool ADDED>
__device__ __forceinline__ void load_sum(const T* table, const T* added, int64_t id, int64_t ids_in_table, int64_t row,
                                         int64_t width, int column, float (&x)[kVec]) {
  if (id < 0 || id >= ids_in_table) {
    fill(x, __uint_as_float(0x7fc00000u));
  } else {
    load(table + id * width + column, x);
  }
  if (ADDED) {
    float more[kVec];
    load(added + row * width + column, more);
#pragma unroll
    for (int i = 0; i < kVec; ++i) x[i] += more[i];
  }
}

template <class T, int PASSES, bool ADDED, bool NORM>
__global__ void __launch_bounds__(kRowThreads)
    byte_embedding_forward(const int64_t* __restrict__ ids, const T* __restrict__ table, const T* __restrict__ added,
                           const T* __restrict__ weight, float* __restrict__ stream, T* __restrict__ normed,
                           float* __restrict__ scale, int64_t rows, int64_t width, int64_t ids_in_table, float eps) {
  constexpr int R = kRows<PASSES, false>;
  BlockSums<R> sums{shared_memory<float>()};
  const int64_t first = int64_t(blockIdx.x) * kRowsPerBlock, end = min(first + kRowsPerBlock, rows);
  for (int64_t row = first; row < end; row += R) {
    float x[R][PASSES][kVec], squares[R];
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const int64_t id = row + r < end ? __ldg(ids + row + r) : 0;
#pragma unroll
      for (int k = 0; k < PASSES; ++k) {
        const int column = (k * blockDim.x + threadIdx.x) * kVec;
        fill(x[r][k], 0.f);
        if (row + r < end && column < width)
          load_sum<T, ADDED>(table, added, id, ids_in_table, row + r, width, column, x[r][k]);
      }
    }
    if (NORM) {
#pragma unroll
      for (int r = 0; r < R; ++r) {
        squares[r] = 0.f;
#pragma unroll
        for (int k = 0; k < PASSES; ++k)
#pragma unroll
          for (int i = 0; i < kVec; ++i) squares[r] = fmaf(x[r][k][i], x[r][k][i], squares[r]);
      }
      sums(squares);
    }
#pragma unroll
    for (int r = 0; r < R; ++r) {
      if (row + r >= end) break;
      const float rms = NORM ? rsqrtf(squares[r] / float(width) + eps) : 0.f;
      if (NORM && threadIdx.x == 0) scale[row + r] = rms;
#pragma unroll
      for (int k = 0; k < PASSES; ++k) {
        const int column = (k * blockDim.x + threadIdx.x) * kVec;
        if (column >= width) break;
        if (stream) store(stream + (row + r) * width + column, x[r][k]);
        if (NORM) {
          float w[kVec];
          load(weight + column, w);
#pragma unroll
          for (int i = 0; i < kVec; ++i) w[i] *= x[r][k][i] * rms;
          store(normed + (row + r) * width + column, w);
        }
      }
    }
  }
}

// Where the sums of a backward pass go; pointers may be null where nobody wants a gradient.
template <class T>
struct Gradients {
  T* table;           // [ids, width], whole runs only
  float* run_sums;    // [pieces, 2, width]: of the run that began before the piece, of the one that goes on behind it
  T* added;           // [rows, width]
  float* norm_sums;   // [pieces, width], of the norm's weight
};

// What came in for the rows of one block.
template <class T>
struct Incoming {
  const float* stream;  // [rows, width] or null
  const T* normed;      // [rows, width]; read with NORM
};

template <class T, int PASSES>
__device__ __forceinline__ void finish_run(const Gradients<T>& out, const int64_t* run_starts, int64_t id, int64_t first,
                                           int64_t end, int64_t width, float (&sum)[PASSES][kVec]) {
  const int64_t begins = __ldg(run_starts + id), ends = __ldg(run_starts + id + 1);
  const bool whole = begins >= first && ends <= end;
#pragma unroll
  for (int k = 0; k < PASSES; ++k) {
    const int column = (k * blockDim.x + threadIdx.x) * kVec;
    if (column < width) {
      if (whole) store(out.table + id * width + column, sum[k]);
      else store(out.run_sums + (int64_t(blockIdx.x) * 2 + (begins >= first)) * width + column, sum[k]);
    }
    fill(sum[k], 0.f);
  }
}

// One piece of the order: rows order[first..end), or first..end themselves where no order is given.
template <class T, int PASSES, bool ADDED, bool NORM>
__global__ void __launch_bounds__(kRowThreads)
    byte_embedding_backward(Incoming<T> in, const int64_t* __restrict__ ids, const int64_t* __restrict__ order,
                            const int64_t* __restrict__ run_starts, const T* __restrict__ table,
                            const T* __restrict__ added, const T* __restrict__ weight, const float* __restrict__ scale,
                            Gradients<T> out, int64_t rows, int64_t width, int64_t ids_in_table, int64_t piece) {
  constexpr int R = kRows<PASSES, NORM>;
  BlockSums<R> sums{shared_memory<float>()};
  const int64_t first = int64_t(blockIdx.x) * piece, end = min(first + piece, rows);
  float run[PASSES][kVec], norm[PASSES][kVec];
#pragma unroll
  for (int k = 0; k < PASSES; ++k) fill(run[k], 0.f), fill(norm[k], 0.f);
  int64_t current = -1;
  for (int64_t place = first; place < end; place += R) {
    float dx[R][PASSES][kVec], x[R][PASSES][kVec], along[R];
    int64_t row[R], id[R];
#pragma unroll
    for (int r = 0; r < R; ++r) {
      row[r] = place + r < end ? (order ? __ldg(order + place + r) : place + r) : 0;
      id[r] = place + r < end ? __ldg(ids + row[r]) : 0;
      along[r] = 0.f;
#pragma unroll
      for (int k = 0; k < PASSES; ++k) {
        const int column = (k * blockDim.x + threadIdx.x) * kVec;
        const bool on = place + r < end && column < width;
        fill(dx[r][k], 0.f);
        if (on && in.stream) load(in.stream + row[r] * width + column, dx[r][k]);
        if (NORM && on) {
          float dy[kVec], w[kVec];
          load(in.normed + row[r] * width + column, dy);
          load_sum<T, ADDED>(table, added, id[r], ids_in_table, row[r], width, column, x[r][k]);
          load(weight + column, w);
          const float rms = __ldg(scale + row[r]);
#pragma unroll
          for (int i = 0; i < kVec; ++i) {
            x[r][k][i] *= rms;
            norm[k][i] = fmaf(dy[i], x[r][k][i], norm[k][i]);
            w[i] *= dy[i];
            along[r] = fmaf(w[i], x[r][k][i], along[r]);
            dx[r][k][i] = fmaf(w[i], rms, dx[r][k][i]);
          }
        } else if (NORM) {
          fill(x[r][k], 0.f);
        }
      }
    }
    if (NORM) sums(along);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      if (place + r >= end) break;
      if (order && id[r] != current) {
        if (current >= 0) finish_run<T, PASSES>(out, run_starts, current, first, end, width, run);
        current = id[r];
      }
      const float share = NORM ? along[r] / float(width) * __ldg(scale + row[r]) : 0.f;
#pragma unroll
      for (int k = 0; k < PASSES; ++k) {
        const int column = (k * blockDim.x + threadIdx.x) * kVec;
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
          if (NORM) dx[r][k][i] = fmaf(-share, x[r][k][i], dx[r][k][i]);
          run[k][i] += dx[r][k][i];
        }
        if (ADDED && out.added && column < width) store(out.added + row[r] * width + column, dx[r][k]);
      }
    }
  }
  if (order && current >= 0) finish_run<T, PASSES>(out, run_starts, current, first, end, width, run);
#pragma unroll
  for (int k = 0; k < PASSES; ++k) {
    const int column = (k * blockDim.x + threadIdx.x) * kVec;
    if (NORM && out.norm_sums && column < width) store(out.norm_sums + int64_t(blockIdx.x) * width + column, norm[k]);
  }
}

// Adds the partial sums of one id a block row: its run lies in the pieces begins / piece ... (ends - 1) / piece.
template <class T>
__global__ void __launch_bounds__(32 * kSumGroups)
    add_run_sums(const float* __restrict__ run_sums, const int64_t* __restrict__ run_starts, T* __restrict__ table,
                 int64_t width, int64_t piece) {
  const int64_t id = blockIdx.x, begins = run_starts[id], ends = run_starts[id + 1];
  const int64_t first = begins / piece, last = ends > begins ? (ends - 1) / piece : first;
  if (ends > begins && first == last) return;  // written whole
  const int64_t column = (int64_t(blockIdx.y) * 32 + threadIdx.x) * kVec;
  float sum[kVec];
  fill(sum, 0.f);
  if (ends > begins && column < width)
    for (int64_t at = first + threadIdx.y; at <= last; at += kSumGroups) {
      float more[kVec];
      load(run_sums + (at * 2 + (at == first)) * width + column, more);
#pragma unroll
      for (int i = 0; i < kVec; ++i) sum[i] += more[i];
    }
  add_groups<kSumGroups>(sum);
  if (threadIdx.y == 0 && column < width) store(table + id * width + column, sum);
}

template <class T>
int backward(Incoming<T> in, const int64_t* ids, const int64_t* order, const int64_t* run_starts, const T* table,
             const T* added, const T* weight, const float* scale, Gradients<T> out, int64_t rows, int64_t width,
             int64_t ids_in_table, int64_t piece, void* stream) {
  return for_width(width, [&](auto passes, int threads) {
    constexpr int P = decltype(passes)::value;
    const auto kernel = added ? (weight ? byte_embedding_backward<T, P, true, true> : byte_embedding_backward<T, P, true, false>)
                              : (weight ? byte_embedding_backward<T, P, false, true> : byte_embedding_backward<T, P, false, false>);
    const dim3 grid(unsigned(ceil_div(rows, piece)));
    return launch(kernel, grid, dim3(threads), BlockSums<kRows<P, false>>::kFloats * sizeof(float), stream, in, ids, order,
                  run_starts, table, added, weight, scale, out, rows, width, ids_in_table, piece);
  });
}

}  // namespace
}  // namespace mbk

// ids [rows]; table [ids_in_table, width]; added [rows, width] or null; weight [width] or null (no norm).
// Out: stream [rows, width] fp32 or null; with a norm normed [rows, width] and scale [rows] fp32.
MBK_API int mbk_byte_embedding_forward(const int64_t* ids, const void* table, const void* added, const void* weight,
                                       float* stream_out, void* normed, float* scale, int64_t rows, int64_t width,
                                       int64_t ids_in_table, double eps, int64_t dtype, void* stream) {
  using namespace mbk;
  if (rows == 0) return 0;
  return for_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    return for_width(width, [&](auto passes, int threads) {
      constexpr int P = decltype(passes)::value;
      const auto kernel = added ? (weight ? byte_embedding_forward<T, P, true, true> : byte_embedding_forward<T, P, true, false>)
                                : (weight ? byte_embedding_forward<T, P, false, true> : byte_embedding_forward<T, P, false, false>);
      const dim3 grid(unsigned(ceil_div<int64_t>(rows, kRowsPerBlock)));
      return launch(kernel, grid, dim3(threads), BlockSums<kRows<P, false>>::kFloats * sizeof(float), stream, ids,
                    static_cast<const T*>(table), static_cast<const T*>(added), static_cast<const T*>(weight), stream_out,
                    static_cast<T*>(normed), scale, rows, width, ids_in_table, float(eps));
    });
  });
}

// d_stream fp32 and d_normed may be null (nothing came in). order [rows] sorts ids and run_starts [ids_in_table + 1]
// holds the first place of each id in it; both null where d_table is not wanted. run_sums [pieces, 2, width] and
// norm_sums [pieces, width] are scratch in fp32 for pieces = ceil(rows / piece).
MBK_API int mbk_byte_embedding_backward(const float* d_stream, const void* d_normed, const int64_t* ids,
                                        const int64_t* order, const int64_t* run_starts, const void* table,
                                        const void* added, const void* weight, const float* scale, void* d_table,
                                        void* d_added, void* d_weight, float* run_sums, float* norm_sums, int64_t rows,
                                        int64_t width, int64_t ids_in_table, int64_t piece, int64_t dtype, void* stream) {
  using namespace mbk;
  return for_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    if (rows) {
      const Incoming<T> in{d_stream, static_cast<const T*>(d_normed)};
      const Gradients<T> out{static_cast<T*>(d_table), run_sums, static_cast<T*>(d_added), norm_sums};
      const int code = backward<T>(in, ids, order, run_starts, static_cast<const T*>(table), static_cast<const T*>(added),
                                   static_cast<const T*>(weight), scale, out, rows, width, ids_in_table, piece, stream);
      if (code) return code;
    }
    const dim3 columns(unsigned(ceil_div<int64_t>(width, 32 * kVec))), block(32, kSumGroups);
    const size_t shared = sum_groups_bytes(kSumGroups);
    if (d_table) {
      const int code = launch(add_run_sums<T>, dim3(unsigned(ids_in_table), columns.x), block, shared, stream, run_sums,
                              run_starts, static_cast<T*>(d_table), width, piece);
      if (code) return code;
    }
    if (!d_weight) return 0;
    return sum_rows(norm_sums, static_cast<T*>(d_weight), ceil_div(rows, piece), width, stream);
  });
}
