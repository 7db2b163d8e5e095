// F3: a chunk's state from the states of its bytes: the last one, (mean + last) / 2, or the elementwise maximum.
//
// Forward: a thread owns 8 channels of one chunk and keeps 4 rows in flight. Backward: a block owns a run of bytes, so
// that every gradient row is written once, that of a byte in no chunk too, and a long chunk does not fall to one block.
#include "kernel.h"

namespace mbk {
namespace {

enum Pooling : int { kLast = 0, kMeanLast = 1, kMax = 2 };
constexpr int kThreads = 128;
constexpr int kUnroll = 4;
constexpr int kRun = 16;  // bytes of a backward block; the lanes of a warp hold the chunks that it can meet

template <class T, int MODE>
__global__ void __launch_bounds__(kThreads, 1) chunk_pool_fwd(
    const T* __restrict__ r, const int64_t* __restrict__ begins, const int64_t* __restrict__ ends, T* __restrict__ pooled,
    int* __restrict__ argmax, int64_t chunks, int64_t width) {
  const int64_t at = (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * kVec, chunk = blockIdx.x;
  if (at >= width) return;
  float result[kVec], v[kUnroll][kVec];
  int best[kVec];  // byte of the row; -1: none
  fill(result, 0.f);
#pragma unroll
  for (int i = 0; i < kVec; ++i) best[i] = -1;
  if (chunk < chunks) {
    const int64_t begin = begins[chunk], end = ends[chunk];
    for (int64_t t = MODE == kLast ? end : begin; t <= end; t += kUnroll) {
#pragma unroll
      for (int u = 0; u < (MODE == kLast ? 1 : kUnroll); ++u) load(r + min(t + u, end) * width + at, v[u]);
#pragma unroll
      for (int u = 0; u < (MODE == kLast ? 1 : kUnroll); ++u) {
        if (t + u > end) break;
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
          const float x = v[u][i];
          if (MODE != kMax) result[i] += x;
          else if (best[i] < 0 || x > result[i] || (x != x && result[i] == result[i])) result[i] = x, best[i] = int(t + u);
        }
      }
    }
    if (MODE == kMeanLast) {
      load(r + end * width + at, v[0]);
      const float scale = 1.f / float(end - begin + 1);
#pragma unroll
      for (int i = 0; i < kVec; ++i) result[i] = 0.5f * fmaf(result[i], scale, v[0][i]);
    }
  }
  store(pooled + chunk * width + at, result);
  if (MODE == kMax) {
    uint4* to = reinterpret_cast<uint4*>(argmax + chunk * width + at);
    to[0] = make_uint4(best[0], best[1], best[2], best[3]);
    to[1] = make_uint4(best[4], best[5], best[6], best[7]);
  }
}

// First of the ascending ends[0..chunks) that is >= t, or chunks; the whole warp asks for the same t.
__device__ __forceinline__ int64_t first_end(const int64_t* __restrict__ ends, int64_t chunks, int64_t t) {
  const int lane = threadIdx.x & 31;
  int64_t low = 0, size = chunks;  // the answer lies in low .. low + size
  while (size > 0) {
    const int64_t step = (size + 31) / 32, at = low + (lane + 1) * step - 1;
    const int passed = __popc(__ballot_sync(kAll, at < low + size && ends[at] < t));
    low += passed * step;
    size = min(step - 1, size - passed * step);
  }
  return low;
}

template <class T, int MODE>
__global__ void __launch_bounds__(kThreads, 1) chunk_pool_bwd(
    const T* __restrict__ grad, const int64_t* __restrict__ begins, const int64_t* __restrict__ ends,
    const int* __restrict__ argmax, T* __restrict__ dr, int64_t chunks, int64_t bytes, int64_t width) {
  const int64_t at = (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * kVec, t0 = int64_t(blockIdx.x) * kRun;
  const int64_t chunk0 = first_end(ends, chunks, t0), mine = chunk0 + (threadIdx.x & 31);
  const int64_t my_end = mine < chunks ? ends[mine] : bytes, my_begin = mine < chunks ? begins[mine] : bytes;
#pragma unroll
  for (int base = 0; base < kRun; base += kUnroll) {
    float g[kUnroll][kVec], scale[kUnroll];
    uint4 best[kUnroll][2];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t t = t0 + base + u;
      const int offset = __popc(__ballot_sync(kAll, my_end < t));
      const int64_t end = __shfl_sync(kAll, my_end, offset), begin = __shfl_sync(kAll, my_begin, offset);
      scale[u] = 0.f;
      if (t >= begin && t < bytes) {
        if (MODE == kLast) scale[u] = t == end ? 1.f : 0.f;
        if (MODE == kMeanLast) scale[u] = 0.5f / float(end - begin + 1) + (t == end ? 0.5f : 0.f);
        if (MODE == kMax) scale[u] = 1.f;
      }
      if (scale[u] != 0.f && at < width) {
        const int64_t from = (chunk0 + offset) * width + at;
        load(grad + from, g[u]);
        if (MODE == kMax) {
          best[u][0] = __ldg(reinterpret_cast<const uint4*>(argmax + from));
          best[u][1] = __ldg(reinterpret_cast<const uint4*>(argmax + from) + 1);
        }
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t t = t0 + base + u;
      if (t >= bytes || at >= width) continue;
      float out[kVec];
      fill(out, 0.f);
      if (scale[u] != 0.f) {
        const uint4 a = best[u][0], b = best[u][1];
        const unsigned from[kVec] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
        for (int i = 0; i < kVec; ++i)
          if (MODE != kMax || from[i] == unsigned(t)) out[i] = scale[u] * g[u][i];
      }
      store(dr + t * width + at, out);
    }
  }
}

dim3 block_of(int64_t width) { return dim3(unsigned(min(ceil_div<int64_t>(width, 32 * kVec) * 32, int64_t(kThreads)))); }
dim3 grid_of(int64_t rows, int64_t width) {
  return dim3(unsigned(rows), unsigned(ceil_div<int64_t>(width / kVec, block_of(width).x)));
}

// f(integral_constant of the mode).
template <class F>
int for_mode(int64_t mode, int64_t width, F f) {
  if (width <= 0 || width % kVec) return fail(kBadArgument, "chunk pooling: the width is not a multiple of 8");
  if (mode == kLast) return f(std::integral_constant<int, kLast>{});
  if (mode == kMeanLast) return f(std::integral_constant<int, kMeanLast>{});
  if (mode == kMax) return f(std::integral_constant<int, kMax>{});
  return fail(kBadArgument, "chunk pooling: the mode is none of 0 (last), 1 (mean_last), 2 (max)");
}

}  // namespace
}  // namespace mbk

// r: [bytes, width]. begins, ends: [chunks] at least. pooled: [padded, width], zero from `chunks` on.
// argmax: [padded, width] in mode max (byte of the row, -1 on padding), else null.
MBK_API int mbk_chunk_pool_forward(const void* r, const int64_t* begins, const int64_t* ends, void* pooled, int* argmax,
                               int64_t chunks, int64_t padded, int64_t width, int64_t mode, int64_t dtype,
                               void* stream) {
  using namespace mbk;
  return for_mode(mode, width, [&](auto known) {
    return for_dtype(dtype, [&](auto zero) {
      using T = decltype(zero);
      if (padded == 0) return 0;
      return launch(chunk_pool_fwd<T, decltype(known)::value>, grid_of(padded, width), block_of(width), 0, stream,
                    static_cast<const T*>(r), begins, ends, static_cast<T*>(pooled), argmax, chunks, width);
    });
  });
}
// grad: [chunks, width] at least. dr: [bytes, width], every row is written.
MBK_API int mbk_chunk_pool_backward(const void* grad, const int64_t* begins, const int64_t* ends, const int* argmax, void* dr,
                               int64_t chunks, int64_t bytes, int64_t width, int64_t mode, int64_t dtype,
                               void* stream) {
  using namespace mbk;
  return for_mode(mode, width, [&](auto known) {
    return for_dtype(dtype, [&](auto zero) {
      using T = decltype(zero);
      if (bytes == 0) return 0;
      return launch(chunk_pool_bwd<T, decltype(known)::value>, grid_of(ceil_div<int64_t>(bytes, kRun), width),
                    block_of(width), 0, stream, static_cast<const T*>(grad), begins, ends, argmax,
                    static_cast<T*>(dr), chunks, bytes, width);
    });
  });
}
