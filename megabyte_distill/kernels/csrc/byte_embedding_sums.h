// F1 backward: sums of rows by id over the sorted order, without atomics; the pieces' parts are added up in order.
#pragma once
#include "byte_embedding_rows.h"

namespace mbk {
namespace {

constexpr int kInFlight = 4;  // rows whose loads are under way together where they are summed: 64 bytes
// Of a multiprocessor, which limits registers; the caller counts on 5. A row of bf16 takes half the threads.
template <class T>
constexpr int kSumBlocks = sizeof(T) == 2 ? 4 : 5;

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

// 16 bytes of a row as they lie in memory, zeros at first.
template <class T>
struct Sixteen;
template <>
struct Sixteen<float> {
  float4 values = make_float4(0.f, 0.f, 0.f, 0.f);
  __device__ __forceinline__ void load(const float* from) { values = __ldg(reinterpret_cast<const float4*>(from)); }
  __device__ __forceinline__ void load_streaming(const float* from) { values = __ldcs(reinterpret_cast<const float4*>(from)); }
  __device__ __forceinline__ void unpack(float (&to)[kNumbers<float>]) const {
    to[0] = values.x, to[1] = values.y, to[2] = values.z, to[3] = values.w;
  }
};
template <>
struct Sixteen<bf16> {
  Packet<bf16> packet{make_uint4(0u, 0u, 0u, 0u)};
  __device__ __forceinline__ void load(const bf16* from) { packet.load(from); }
  __device__ __forceinline__ void load_streaming(const bf16* from) { packet.load_streaming(from); }
  __device__ __forceinline__ void unpack(float (&to)[kNumbers<bf16>]) const { packet.unpack(to); }
};

// sums[id] = sum of the rows of one piece of the order; parts [pieces, 2, width]: of the run that began before the piece,
// of the one that goes on behind it. With COPY every row also goes to copy in Out's dtype.
template <class In, class Out, bool COPY>
__global__ void __launch_bounds__(kFlatThreads, kSumBlocks<In>)
    sum_by_id(const In* __restrict__ from, const int64_t* __restrict__ ids, const int* __restrict__ order,
              const int* __restrict__ run_starts, Out* __restrict__ sums, float* __restrict__ parts,
              Out* __restrict__ copy, int64_t width, int piece) {
  constexpr int N = kNumbers<In>, R = kInFlight;
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
      Sixteen<In> sixteen[R];
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const int64_t row = __shfl_sync(kAll, my_row, at + r);
        if (base + at + r >= end || column >= width) continue;
        // beside a copy that is written, rows that are read once do better in the cache (seen on an H200)
        if (COPY) sixteen[r].load(from + row * width + column);
        else sixteen[r].load_streaming(from + row * width + column);
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
        sixteen[r].unpack(x);
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
  const dim3 grid = flat_grid(ceil_div<int64_t>(order.rows, order.piece), width, kNumbers<In>, &threads);
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
