// F1: rows of a byte table, plus a state that is there already, then RMSNorm; and all its gradients.
//
//   x_t = table[id_t] + added_t          kept in fp32, the residual stream, if the caller wants it
//   y_t = x_t * scale_t * weight         scale_t = 1 / sqrt(mean(x_t^2) + eps)
//
// Without an added state there are only 256 different rows: they are normed first, and each byte takes its own; the
// gradient is summed by id first and goes through the norm of 256 rows. Sums by id use no atomics: the bytes are sorted,
// stably; a block walks one piece of the sorted order and keeps the sum of the current id in registers. A run of equal
// ids inside a piece is finished there, one that crosses pieces leaves a partial sum in each, and another kernel adds
// those up in order.
#include "kernel.h"

namespace mbk {
namespace {

constexpr int kIds = 256;            // at most, in a table
constexpr int kFlatThreads = 256;    // of blocks that need no sum over the width
constexpr int kGatherRows = 2;       // of a block that gathers
template <class T>
constexpr int kInFlight = 16 / int(sizeof(T));  // rows whose loads are under way together where they are summed: 64 bytes
constexpr int kSumNumbers = 4;                  // of a row a thread sums
constexpr int kSumBlocks = 5;                   // of a multiprocessor, which limits registers; the caller counts on it
constexpr int kOrderThreads = 256;   // one an id
constexpr int kOrderWarps = kOrderThreads / 32;
constexpr int kOrderBlocks = 64;     // at most

// Numbers a thread handles of a row of T: 16 bytes.
template <class T>
constexpr int kNumbers = 16 / int(sizeof(T));

// Threads and tiles of a row of ``width`` numbers, N a thread.
inline dim3 flat_grid(int64_t blocks, int64_t width, int numbers, int* threads) {
  *threads = int(min(int64_t(kFlatThreads), ceil_div<int64_t>(ceil_div<int64_t>(width, numbers), 32) * 32));
  return dim3(unsigned(blocks), unsigned(ceil_div<int64_t>(width, int64_t(*threads) * numbers)));
}
template <int N>
__device__ __forceinline__ int64_t flat_column() {
  return (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * N;
}
__device__ __forceinline__ bool in_table(int64_t id, int64_t ids_in_table) { return id >= 0 && id < ids_in_table; }
__device__ __forceinline__ float nan() { return __uint_as_float(0x7fc00000u); }

// ---- forward ----------------------------------------------------------------------------------------------------

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

// With an added state every row has its own norm; a block holds whole rows, so that one barrier serves several.
template <int PASSES>
constexpr int kNormRows = 2 / PASSES;
constexpr int kNormRowsPerBlock = 16;

template <class T>
__device__ __forceinline__ void load_sum(const T* table, const T* added, int64_t id, int64_t ids_in_table, int64_t row,
                                         int64_t width, int column, float (&x)[kVec]) {
  float more[kVec];
  fill(x, nan());
  if (in_table(id, ids_in_table)) load(table + id * width + column, x);
  load(added + row * width + column, more);
#pragma unroll
  for (int i = 0; i < kVec; ++i) x[i] += more[i];
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

// ---- the sorted order of the bytes ------------------------------------------------------------------------------

// counts[block, id] of the block's span of bytes. Integer sums are the same in any order.
__global__ void __launch_bounds__(kOrderThreads)
    count_ids(const int64_t* __restrict__ ids, int* __restrict__ counts, int64_t rows, int64_t span,
              int64_t ids_in_table) {
  int* const own = shared_memory<int>();
  own[threadIdx.x] = 0;
  __syncthreads();
  const int64_t first = int64_t(blockIdx.x) * span, end = min(first + span, rows);
  for (int64_t t = first + threadIdx.x; t < end; t += kOrderThreads) {
    const int64_t id = __ldg(ids + t);
    if (in_table(id, ids_in_table)) atomicAdd(own + id, 1);
  }
  __syncthreads();
  counts[blockIdx.x * kIds + threadIdx.x] = own[threadIdx.x];
}

// Exclusive sum of x over the block's threads.
__device__ __forceinline__ int sum_before(int x, int* memory) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, own = x;
#pragma unroll
  for (int offset = 1; offset < 32; offset <<= 1) {
    const int before = __shfl_up_sync(kAll, x, offset);
    if (lane >= offset) x += before;
  }
  if (lane == 31) memory[warp] = x;
  __syncthreads();
  for (int w = 0; w < warp; ++w) x += memory[w];
  return x - own;
}

// order: places of the bytes, sorted by id, equal ids as they stand; run_starts[id]: first place of an id in it, and the
// number of all at the end. Bytes outside the table have no place.
__global__ void __launch_bounds__(kOrderThreads)
    place_ids(const int64_t* __restrict__ ids, const int* __restrict__ counts, int* __restrict__ order,
              int* __restrict__ run_starts, int64_t rows, int64_t span, int blocks, int64_t ids_in_table) {
  int* const next = shared_memory<int>();  // [warps, ids]: where the warp's next byte of an id goes
  int* const sums = next + kOrderWarps * kIds;
  int before = 0, all = 0;
#pragma unroll 8
  for (int block = 0; block < blocks; ++block) {
    const int count = __ldg(counts + block * kIds + threadIdx.x);
    all += count;
    if (block < int(blockIdx.x)) before += count;
  }
  const int start = sum_before(all, sums);
  if (blockIdx.x == 0) {
    run_starts[threadIdx.x] = start;
    if (threadIdx.x == kIds - 1) run_starts[kIds] = start + all;
  }
  for (int i = threadIdx.x; i < kOrderWarps * kIds; i += kOrderThreads) next[i] = 0;
  __syncthreads();
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  int* const own = next + warp * kIds;
  const int64_t first = int64_t(blockIdx.x) * span + warp * (span / kOrderWarps);
  const int64_t end = min(first + span / kOrderWarps, rows);
  for (int64_t t = first + lane; t < end; t += 32) {
    const int64_t id = __ldg(ids + t);
    if (in_table(id, ids_in_table)) atomicAdd(own + id, 1);
  }
  __syncthreads();
  int running = start + before;
  for (int w = 0; w < kOrderWarps; ++w) {
    const int count = next[w * kIds + threadIdx.x];
    next[w * kIds + threadIdx.x] = running;
    running += count;
  }
  __syncthreads();
  for (int64_t base = first; base < end; base += 32) {
    const int64_t t = base + lane, id = t < end ? __ldg(ids + t) : -1;
    const bool counts_here = in_table(id, ids_in_table);
    const unsigned same = __match_any_sync(kAll, counts_here ? unsigned(id) : unsigned(kIds));
    const int rank = __popc(same & ((1u << lane) - 1u));
    if (counts_here) order[own[id] + rank] = int(t);
    __syncwarp();
    if (counts_here && rank == 0) own[id] += __popc(same);
    __syncwarp();
  }
}

// ---- sums by id -------------------------------------------------------------------------------------------------

// Stores the sum of a run: whole in sums[id], or as the part of it that lies in this piece.
template <class Out, int N>
__device__ __forceinline__ void finish_run(Out* sums, float* parts, const int* run_starts, int id, int64_t first,
                                           int64_t end, int64_t width, int64_t column, float (&sum)[N]) {
  const int begins = __ldg(run_starts + id), ends = __ldg(run_starts + id + 1);
  if (column < width) {
    if (begins >= first && ends <= end) store_some(sums + id * width + column, sum);
    else store_some(parts + (int64_t(blockIdx.x) * 2 + (begins >= first)) * width + column, sum);
  }
#pragma unroll
  for (int i = 0; i < N; ++i) sum[i] = 0.f;
}

// kSumNumbers numbers as they lie in memory, zeros at first.
template <class T>
struct Four;
template <>
struct Four<float> {
  float4 values = make_float4(0.f, 0.f, 0.f, 0.f);
  __device__ __forceinline__ void load(const float* from) { values = __ldg(reinterpret_cast<const float4*>(from)); }
  __device__ __forceinline__ void unpack(float (&to)[kSumNumbers]) const {
    to[0] = values.x, to[1] = values.y, to[2] = values.z, to[3] = values.w;
  }
};
template <>
struct Four<bf16> {
  uint2 bits = make_uint2(0u, 0u);
  __device__ __forceinline__ void load(const bf16* from) { bits = __ldg(reinterpret_cast<const uint2*>(from)); }
  __device__ __forceinline__ void unpack(float (&to)[kSumNumbers]) const {
    to[0] = bf16_low(bits.x), to[1] = bf16_high(bits.x), to[2] = bf16_low(bits.y), to[3] = bf16_high(bits.y);
  }
};

// sums[id] = sum of the rows of one piece of the order; parts [pieces, 2, width]: of the run that began before the piece,
// of the one that goes on behind it. With COPY every row also goes to copy in Out's dtype.
template <class In, class Out, bool COPY>
__global__ void __launch_bounds__(kFlatThreads, kSumBlocks)
    sum_by_id(const In* __restrict__ from, const int64_t* __restrict__ ids, const int* __restrict__ order,
              const int* __restrict__ run_starts, Out* __restrict__ sums, float* __restrict__ parts,
              Out* __restrict__ copy, int64_t width, int piece) {
  constexpr int N = kSumNumbers, R = kInFlight<In>;
  const int64_t column = flat_column<N>(), first = int64_t(blockIdx.x) * piece;
  const int64_t end = min(first + piece, int64_t(__ldg(run_starts + kIds)));
  float sum[N];
#pragma unroll
  for (int i = 0; i < N; ++i) sum[i] = 0.f;
  int current = -1;
  for (int64_t base = first; base < end; base += 32) {
    const int64_t place = base + (threadIdx.x & 31);
    const int my_row = place < end ? __ldg(order + place) : 0, my_id = place < end ? int(__ldg(ids + my_row)) : -1;
    for (int at = 0; at < 32 && base + at < end; at += R) {
      Four<In> four[R];
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const int64_t row = __shfl_sync(kAll, my_row, at + r);
        if (base + at + r < end && column < width) four[r].load(from + row * width + column);
      }
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const int64_t row = __shfl_sync(kAll, my_row, at + r);
        const int id = __shfl_sync(kAll, my_id, at + r);
        if (base + at + r >= end) break;
        if (id != current) {
          if (current >= 0) finish_run(sums, parts, run_starts, current, first, end, width, column, sum);
          current = id;
        }
        float x[N];
        four[r].unpack(x);
#pragma unroll
        for (int i = 0; i < N; ++i) sum[i] += x[i];
        if (COPY && column < width) store_some(copy + row * width + column, x);
      }
    }
  }
  if (current >= 0) finish_run(sums, parts, run_starts, current, first, end, width, column, sum);
}

// Adds the parts of one id a block row: its run lies in the pieces begins / piece ... (ends - 1) / piece.
template <class Out>
__global__ void __launch_bounds__(32 * kSumGroups)
    add_parts(const float* __restrict__ parts, const int* __restrict__ run_starts, Out* __restrict__ sums, int64_t width,
              int piece) {
  const int id = int(blockIdx.x), begins = run_starts[id], ends = run_starts[id + 1];
  const int first = begins / piece, last = ends > begins ? (ends - 1) / piece : first;
  if (ends > begins && first == last) return;  // stored whole
  const int64_t column = (int64_t(blockIdx.y) * 32 + threadIdx.x) * kVec;
  float sum[kVec];
  fill(sum, 0.f);
  if (ends > begins && column < width)
#pragma unroll 4
    for (int at = first + int(threadIdx.y); at <= last; at += kSumGroups) {
      float more[kVec];
      load(parts + (int64_t(at) * 2 + (at == first)) * width + column, more);
#pragma unroll
      for (int i = 0; i < kVec; ++i) sum[i] += more[i];
    }
  add_groups<kSumGroups>(sum);
  if (threadIdx.y == 0 && column < width) store(sums + id * width + column, sum);
}

// ---- backward through the norm ----------------------------------------------------------------------------------

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

// The sorted order of the bytes and where its runs of one id begin.
struct Order {
  const int64_t* ids;
  const int* places;
  const int* run_starts;
  int64_t rows, ids_in_table;
  int piece;
};

// sums [ids, width] of rows by id; copy: null, or where each row goes in Out's dtype.
template <class In, class Out>
int sum_rows_by_id(const In* from, const Order& order, Out* sums, float* parts, Out* copy, int64_t width, void* stream) {
  int threads, code = 0;
  const dim3 grid = flat_grid(ceil_div<int64_t>(order.rows, order.piece), width, kSumNumbers, &threads);
  if (order.rows) {
    const auto kernel = copy ? sum_by_id<In, Out, true> : sum_by_id<In, Out, false>;
    code = launch(kernel, grid, dim3(threads), 0, stream, from, order.ids, order.places, order.run_starts, sums, parts, copy,
                  width, order.piece);
  }
  if (code) return code;
  const dim3 columns(unsigned(order.ids_in_table), unsigned(ceil_div<int64_t>(width, 32 * kVec)));
  return launch(add_parts<Out>, columns, dim3(32, kSumGroups), sum_groups_bytes(kSumGroups), stream, parts,
                order.run_starts, sums, width, order.piece);
}

}  // namespace
}  // namespace mbk

// ids [rows]; table [ids_in_table, width]; added [rows, width] or null. Out: stream_out [rows, width] fp32.
MBK_API int mbk_byte_embedding_stream(const int64_t* ids, const void* table, const void* added, float* stream_out,
                                      int64_t rows, int64_t width, int64_t ids_in_table, int64_t dtype, void* stream) {
  using namespace mbk;
  if (rows == 0) return 0;
  return for_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    int threads;
    const dim3 grid = flat_grid(ceil_div<int64_t>(rows, kGatherRows), width, kNumbers<float>, &threads);
    const auto kernel = added ? gather_rows<T, float, true> : gather_rows<T, float, false>;
    return launch(kernel, grid, dim3(threads), 0, stream, ids, static_cast<const T*>(table), static_cast<const T*>(added),
                  stream_out, rows, width, ids_in_table);
  });
}

// As above with a norm of weight [width] and no added state. Out: normed_table and scale [ids_in_table(, width)],
// normed [rows, width].
MBK_API int mbk_byte_embedding_normed(const int64_t* ids, const void* table, const void* weight, void* normed_table,
                                      float* scale, void* normed, int64_t rows, int64_t width, int64_t ids_in_table,
                                      double eps, int64_t dtype, void* stream) {
  using namespace mbk;
  return for_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    const int code = launch(norm_table<T>, dim3(unsigned(ids_in_table)), dim3(kFlatThreads),
                            BlockSums<1>::kFloats * sizeof(float), stream, static_cast<const T*>(table),
                            static_cast<const T*>(weight), static_cast<T*>(normed_table), scale, width, float(eps));
    if (code || rows == 0) return code;
    int threads;
    const dim3 grid = flat_grid(ceil_div<int64_t>(rows, kGatherRows), width, kNumbers<T>, &threads);
    return launch(gather_rows<T, T, false>, grid, dim3(threads), 0, stream, ids, static_cast<const T*>(normed_table),
                  static_cast<const T*>(nullptr), static_cast<T*>(normed), rows, width, ids_in_table);
  });
}

// With an added state and a norm. Out: stream_out [rows, width] fp32 or null, normed [rows, width], scale [rows].
MBK_API int mbk_byte_embedding_added_normed(const int64_t* ids, const void* table, const void* added, const void* weight,
                                            float* stream_out, void* normed, float* scale, int64_t rows, int64_t width,
                                            int64_t ids_in_table, double eps, int64_t dtype, void* stream) {
  using namespace mbk;
  if (rows == 0) return 0;
  return for_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    return for_width(width, [&](auto passes, int threads) {
      constexpr int P = decltype(passes)::value;
      return launch(norm_sums_forward<T, P>, dim3(unsigned(ceil_div<int64_t>(rows, kNormRowsPerBlock))), dim3(threads),
                    BlockSums<kNormRows<P>>::kFloats * sizeof(float), stream, ids, static_cast<const T*>(table),
                    static_cast<const T*>(added), static_cast<const T*>(weight), stream_out, static_cast<T*>(normed), scale,
                    rows, width, ids_in_table, float(eps));
    });
  });
}

// order [rows] and run_starts [257] int32 of ids [rows]; counts [64, 256] int32 is scratch.
MBK_API int mbk_byte_order(const int64_t* ids, int* counts, int* order, int* run_starts, int64_t rows,
                           int64_t ids_in_table, void* stream) {
  using namespace mbk;
  if (ids_in_table < 0 || ids_in_table > kIds) return fail(kBadArgument, "a table has at most 256 rows");
  const int64_t span = max(int64_t(1), ceil_div<int64_t>(rows, kOrderBlocks * kOrderThreads)) * kOrderThreads;
  const int blocks = int(max(int64_t(1), ceil_div(rows, span)));
  const int code = launch(count_ids, dim3(blocks), dim3(kOrderThreads), kIds * sizeof(int), stream, ids, counts, rows, span,
                          ids_in_table);
  if (code) return code;
  return launch(place_ids, dim3(blocks), dim3(kOrderThreads), (kOrderWarps * kIds + kOrderWarps) * sizeof(int), stream, ids,
                counts, order, run_starts, rows, span, blocks, ids_in_table);
}

// Gradients of mbk_byte_embedding_stream: d_table [ids_in_table, width], d_added [rows, width] or null. parts
// [pieces, 2, width] fp32 is scratch for pieces = ceil(rows / piece).
MBK_API int mbk_byte_embedding_stream_backward(const float* d_stream, const int64_t* ids, const int* order,
                                               const int* run_starts, void* d_table, void* d_added, float* parts,
                                               int64_t rows, int64_t width, int64_t ids_in_table, int64_t piece,
                                               int64_t dtype, void* stream) {
  using namespace mbk;
  const Order sorted{ids, order, run_starts, rows, ids_in_table, int(piece)};
  return for_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    return sum_rows_by_id(d_stream, sorted, static_cast<T*>(d_table), parts, static_cast<T*>(d_added), width, stream);
  });
}

// Gradients of mbk_byte_embedding_normed, and of the stream of the same bytes where d_stream is not null: d_table or null,
// d_weight [width] or null. Scratch in fp32: stream_sums, normed_sums, norm_sums [ids_in_table, width], parts as above.
MBK_API int mbk_byte_embedding_normed_backward(const float* d_stream, const void* d_normed, const int64_t* ids,
                                               const int* order, const int* run_starts, const void* table,
                                               const void* weight, const float* scale, void* d_table, void* d_weight,
                                               float* stream_sums, float* normed_sums, float* norm_sums, float* parts,
                                               int64_t rows, int64_t width, int64_t ids_in_table, int64_t piece,
                                               int64_t dtype, void* stream) {
  using namespace mbk;
  const Order sorted{ids, order, run_starts, rows, ids_in_table, int(piece)};
  return for_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    float* const none = nullptr;
    int code = d_stream ? sum_rows_by_id(d_stream, sorted, stream_sums, parts, none, width, stream) : 0;
    if (!code) code = sum_rows_by_id(static_cast<const T*>(d_normed), sorted, normed_sums, parts, none, width, stream);
    if (code) return code;
    code = launch(norm_table_backward<T>, dim3(unsigned(ids_in_table)), dim3(kFlatThreads),
                  BlockSums<1>::kFloats * sizeof(float), stream, d_stream ? stream_sums : none, normed_sums,
                  static_cast<const T*>(table), static_cast<const T*>(weight), scale, static_cast<T*>(d_table),
                  d_weight ? norm_sums : none, width);
    if (code || !d_weight) return code;
    return sum_rows(norm_sums, static_cast<T*>(d_weight), ids_in_table, width, stream);
  });
}

// Gradients of mbk_byte_embedding_added_normed; d_stream may be null. d_table, d_added, d_weight or null. Scratch in fp32:
// dx [rows, width] and parts where d_table is wanted (order and run_starts too), norm_sums [pieces, width] for d_weight.
MBK_API int mbk_byte_embedding_added_normed_backward(
    const float* d_stream, const void* d_normed, const int64_t* ids, const int* order, const int* run_starts,
    const void* table, const void* added, const void* weight, const float* scale, void* d_table, void* d_added,
    void* d_weight, float* dx, float* norm_sums, float* parts, int64_t rows, int64_t width, int64_t ids_in_table,
    int64_t piece, int64_t dtype, void* stream) {
  using namespace mbk;
  return for_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    const int64_t pieces = ceil_div(rows, piece);
    int code = !rows ? 0 : for_width(width, [&](auto passes, int threads) {
      constexpr int P = decltype(passes)::value;
      return launch(norm_sums_backward<T, P>, dim3(unsigned(pieces)), dim3(threads),
                    BlockSums<kNormRows<P>>::kFloats * sizeof(float), stream, d_stream, static_cast<const T*>(d_normed), ids,
                    static_cast<const T*>(table), static_cast<const T*>(added), static_cast<const T*>(weight), scale,
                    d_table ? dx : static_cast<float*>(nullptr), static_cast<T*>(d_added),
                    d_weight ? norm_sums : static_cast<float*>(nullptr), rows, width, ids_in_table, int(piece));
    });
    if (!code && d_table) {
      const Order sorted{ids, order, run_starts, rows, ids_in_table, int(piece)};
      code = sum_rows_by_id(static_cast<const float*>(dx), sorted, static_cast<T*>(d_table), parts,
                            static_cast<T*>(nullptr), width, stream);
    }
    if (code || !d_weight) return code;
    return sum_rows(norm_sums, static_cast<T*>(d_weight), pieces, width, stream);
  });
}
