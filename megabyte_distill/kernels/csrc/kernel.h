// What every kernel source includes: CUDA or its stand-in, launches, errors, and rows of fp32 or bf16 as fp32 numbers.
//
// The C ABI of the library: names begin with mbk_; arguments are pointers, int64_t and double, in that convention
// because the caller (library.py) converts by kind; a stream (null on a CPU) comes last; 0 means done, anything else that
// mbk_last_error() tells why. Pointers to rows are 16-byte aligned and widths are multiples of kVec.
#pragma once
#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <type_traits>
#else
#include "cuda_on_cpu.h"
#endif

#define MBK_API extern "C" __attribute__((visibility("default")))

namespace mbk {

using bf16 = __nv_bfloat16;
constexpr int kVec = 8;          // numbers a thread handles at once: 16 bytes of bf16
constexpr unsigned kAll = ~0u;   // every lane of a warp
constexpr int kBadArgument = -1;

inline thread_local char last_error[512] = "";
inline int fail(int code, const char* text) {
  snprintf(last_error, sizeof last_error, "%s", text);
  return code;
}

// Calls kernel(args...) on a grid; returns 0 or an error code.
template <class... Params, class... Args>
int launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, void* stream, Args... args) {
#if defined(__CUDACC__)
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(args...);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? 0 : fail(int(error), cudaGetErrorString(error));
#else
  (void)stream;
  try {
    ::cuda_on_cpu::launch(grid, block, shared_bytes, [=] { kernel(args...); });
  } catch (const std::exception& error) {
    return fail(1, error.what());
  }
  return 0;
#endif
}

// The dynamic shared memory of a launch, 16-byte aligned.
template <class T>
__device__ __forceinline__ T* shared_memory() {
#if defined(__CUDACC__)
  extern __shared__ __align__(16) unsigned char mbk_shared[];
  return reinterpret_cast<T*>(mbk_shared);
#else
  return reinterpret_cast<T*>(::cuda_on_cpu::block->shared);
#endif
}

// f(T{}) for the element type that a dtype code means: 0 fp32, 1 bf16.
template <class F>
int for_dtype(int64_t dtype, F f) {
  if (dtype == 0) return f(float{});
  if (dtype == 1) return f(bf16{});
  return fail(kBadArgument, "the dtype code is neither 0 (fp32) nor 1 (bf16)");
}

template <class T>
constexpr T ceil_div(T a, T b) { return (a + b - 1) / b; }

// f(integral_constant<int, PASSES>, threads) for a block that holds a whole row of ``width`` numbers, kVec of them a
// thread and pass, in full warps: thread i has those from (pass * blockDim.x + i) * kVec on. Widths up to kMaxWidth.
constexpr int kRowThreads = 512;
constexpr int kMaxWidth = 2 * kRowThreads * kVec;
template <class F>
int for_width(int64_t width, F f) {
  if (width < kVec || width > kMaxWidth || width % kVec) return fail(kBadArgument, "the width is not a multiple of 8 in [8, 8192]");
  const int passes = width > kRowThreads * kVec ? 2 : 1;
  const int threads = int(ceil_div<int64_t>(ceil_div<int64_t>(width, int64_t(kVec) * passes), 32) * 32);
  if (passes == 1) return f(std::integral_constant<int, 1>{}, threads);
  return f(std::integral_constant<int, 2>{}, threads);
}

// ---- fp32 and bf16 ----------------------------------------------------------------------------------------------

__device__ __forceinline__ float bf16_low(unsigned pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float bf16_high(unsigned pair) { return __uint_as_float(pair & 0xffff0000u); }

// Two numbers rounded to nearest even, the first in the low half.
__device__ __forceinline__ unsigned bf16_pair(float low, float high) {
#if defined(__CUDACC__)
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const unsigned*>(&pair);
#else
  const auto half = [](float x) {
    const unsigned bits = __float_as_uint(x);
    if (x != x) return 0x7fffu;
    return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  };
  return half(low) | half(high) << 16;
#endif
}

__device__ __forceinline__ float nan() { return __uint_as_float(0x7fc00000u); }
__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) {
  return __uint_as_float(unsigned(*reinterpret_cast<const uint16_t*>(&x)) << 16);
}
template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) { return x; }
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) {
  const uint16_t bits = uint16_t(bf16_pair(x, 0.f));
  return *reinterpret_cast<const bf16*>(&bits);
}

// kVec consecutive numbers as they lie in memory: half the registers of their fp32 values where they are bf16, so that more of them
// can be on their way.
template <class T>
struct Packet;
template <>
struct Packet<float> {
  float4 low, high;
  __device__ __forceinline__ void load(const float* from) {
    low = __ldg(reinterpret_cast<const float4*>(from)), high = __ldg(reinterpret_cast<const float4*>(from) + 1);
  }
  __device__ __forceinline__ void unpack(float (&to)[kVec]) const {
    to[0] = low.x, to[1] = low.y, to[2] = low.z, to[3] = low.w;
    to[4] = high.x, to[5] = high.y, to[6] = high.z, to[7] = high.w;
  }
};
template <>
struct Packet<bf16> {
  uint4 bits;
  __device__ __forceinline__ void load(const bf16* from) { bits = __ldg(reinterpret_cast<const uint4*>(from)); }
  // What nobody reads again.
  __device__ __forceinline__ void load_streaming(const bf16* from) { bits = __ldcs(reinterpret_cast<const uint4*>(from)); }
  __device__ __forceinline__ void unpack(float (&to)[kVec]) const {
    to[0] = bf16_low(bits.x), to[1] = bf16_high(bits.x), to[2] = bf16_low(bits.y), to[3] = bf16_high(bits.y);
    to[4] = bf16_low(bits.z), to[5] = bf16_high(bits.z), to[6] = bf16_low(bits.w), to[7] = bf16_high(bits.w);
  }
};
// kVec consecutive numbers; read through the read-only path, so never from what the same kernel writes.
template <class T>
__device__ __forceinline__ void load(const T* from, float (&to)[kVec]) {
  Packet<T> packet;
  packet.load(from);
  packet.unpack(to);
}
__device__ __forceinline__ void store(float* to, const float (&from)[kVec]) {
  *reinterpret_cast<float4*>(to) = make_float4(from[0], from[1], from[2], from[3]);
  *(reinterpret_cast<float4*>(to) + 1) = make_float4(from[4], from[5], from[6], from[7]);
}
__device__ __forceinline__ void store(bf16* to, const float (&from)[kVec]) {
  *reinterpret_cast<uint4*>(to) = make_uint4(bf16_pair(from[0], from[1]), bf16_pair(from[2], from[3]),
                                             bf16_pair(from[4], from[5]), bf16_pair(from[6], from[7]));
}
// N numbers that are 16 bytes in the wider of the types a thread handles.
__device__ __forceinline__ void load_some(const float* from, float (&to)[4]) {
  const float4 a = __ldg(reinterpret_cast<const float4*>(from));
  to[0] = a.x, to[1] = a.y, to[2] = a.z, to[3] = a.w;
}
__device__ __forceinline__ void load_some(const bf16* from, float (&to)[4]) {
  const uint2 q = __ldg(reinterpret_cast<const uint2*>(from));
  to[0] = bf16_low(q.x), to[1] = bf16_high(q.x), to[2] = bf16_low(q.y), to[3] = bf16_high(q.y);
}
template <class T>
__device__ __forceinline__ void load_some(const T* from, float (&to)[kVec]) { load(from, to); }
__device__ __forceinline__ void store_some(float* to, const float (&from)[4]) {
  *reinterpret_cast<float4*>(to) = make_float4(from[0], from[1], from[2], from[3]);
}
__device__ __forceinline__ void store_some(bf16* to, const float (&from)[4]) {
  *reinterpret_cast<uint2*>(to) = make_uint2(bf16_pair(from[0], from[1]), bf16_pair(from[2], from[3]));
}
template <class T>
__device__ __forceinline__ void store_some(T* to, const float (&from)[kVec]) { store(to, from); }
// As store_some, for what is read again only when much else has gone through the cache.
__device__ __forceinline__ void store_streaming(float* to, const float (&from)[4]) {
  __stcs(reinterpret_cast<float4*>(to), make_float4(from[0], from[1], from[2], from[3]));
}
__device__ __forceinline__ void store_streaming(float* to, const float (&from)[kVec]) {
  __stcs(reinterpret_cast<float4*>(to), make_float4(from[0], from[1], from[2], from[3]));
  __stcs(reinterpret_cast<float4*>(to) + 1, make_float4(from[4], from[5], from[6], from[7]));
}
__device__ __forceinline__ void store_streaming(bf16* to, const float (&from)[kVec]) {
  __stcs(reinterpret_cast<uint4*>(to), make_uint4(bf16_pair(from[0], from[1]), bf16_pair(from[2], from[3]),
                                                  bf16_pair(from[4], from[5]), bf16_pair(from[6], from[7])));
}
__device__ __forceinline__ void fill(float (&to)[kVec], float value) {
#pragma unroll
  for (int i = 0; i < kVec; ++i) to[i] = value;
}

// Sum over the lanes of a warp, the same in every lane.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int offset = 16; offset; offset >>= 1) x += __shfl_xor_sync(kAll, x, offset);
  return x;
}


// Four sums over a warp at once: lane 8 g holds that of x[g], as do the seven lanes behind it.
__device__ __forceinline__ float warp_sums_of_four(const float (&x)[4]) {
  const bool high = threadIdx.x & 16, odd = threadIdx.x & 8;
  const float a = (high ? x[2] : x[0]) + __shfl_xor_sync(kAll, high ? x[0] : x[2], 16);
  const float b = (high ? x[3] : x[1]) + __shfl_xor_sync(kAll, high ? x[1] : x[3], 16);
  float sum = (odd ? b : a) + __shfl_xor_sync(kAll, odd ? a : b, 8);
#pragma unroll
  for (int offset = 4; offset; offset >>= 1) sum += __shfl_xor_sync(kAll, sum, offset);
  return sum;
}

// Sums R numbers over the block at a price of one barrier; every thread gets them. All threads call it.
template <int R>
struct BlockSums {
  static constexpr int kFloats = 2 * R * 32;  // of shared memory: two turns, so that one barrier a call is enough
  float* memory;
  int turn = 0;
  __device__ __forceinline__ void operator()(float (&x)[R]) {
    float* own = memory + turn * R * 32;
    turn ^= 1;
#pragma unroll
    for (int r = 0; r < R; ++r) {
      x[r] = warp_sum(x[r]);
      if ((threadIdx.x & 31) == 0) own[r * 32 + (threadIdx.x >> 5)] = x[r];
    }
    __syncthreads();
    const int warps = int(blockDim.x + 31) >> 5;
#pragma unroll
    for (int r = 0; r < R; ++r) {
      x[r] = 0.f;
      for (int w = 0; w < warps; ++w) x[r] += own[r * 32 + w];
    }
  }
};

// Adds up the numbers of the block's GROUPS rows of threads (threadIdx.y) in order; the sums are those of row 0.
constexpr size_t sum_groups_bytes(int groups) { return size_t(groups) * 32 * kVec * sizeof(float); }
template <int GROUPS>
__device__ __forceinline__ void add_groups(float (&sum)[kVec]) {
  float* memory = shared_memory<float>();
  store(memory + (threadIdx.y * 32 + threadIdx.x) * kVec, sum);
  __syncthreads();
  if (threadIdx.y) return;
  for (int group = 1; group < GROUPS; ++group)
#pragma unroll
    for (int i = 0; i < kVec; ++i) sum[i] += memory[(group * 32 + threadIdx.x) * kVec + i];
}

constexpr int kSumGroups = 8;  // rows of threads that share the summing of one column
constexpr int kRowGroups = 32;  // as many for few, long columns: each thread's loads are all under way together

// to[column] = sum of the n rows of from [n, width], in a fixed order.
template <class T>
__global__ void __launch_bounds__(32 * kRowGroups)
    sum_rows_kernel(const float* __restrict__ from, T* __restrict__ to, int64_t n, int64_t width) {
  const int64_t column = (int64_t(blockIdx.x) * 32 + threadIdx.x) * kVec;
  float sum[kVec];
  fill(sum, 0.f);
  if (column < width)
#pragma unroll 8
    for (int64_t row = threadIdx.y; row < n; row += kRowGroups) {
      float more[kVec];
      load(from + row * width + column, more);
#pragma unroll
      for (int i = 0; i < kVec; ++i) sum[i] += more[i];
    }
  add_groups<kRowGroups>(sum);
  if (threadIdx.y == 0 && column < width) store(to + column, sum);
}
template <class T>
int sum_rows(const float* from, T* to, int64_t n, int64_t width, void* stream) {
  return launch(sum_rows_kernel<T>, dim3(unsigned(ceil_div<int64_t>(width, 32 * kVec))), dim3(32, kRowGroups),
                sum_groups_bytes(kRowGroups), stream, from, to, n, width);
}

}  // namespace mbk
