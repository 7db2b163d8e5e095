// F2: routing after the projections. p_t = (1 - cos(q_t, k_{t+1})) / 2, and 1 at every segment's last byte.
//
// A warp owns the pair (q_t, k_{t+1}): each row is read once, forward and backward. The forward keeps 1/|q| and 1/|k|
// of the pair, zero at a segment's last byte, so that the backward is elementwise.
#include "kernel.h"

namespace mbk {
namespace {

constexpr float kCosineEps = 1e-8f;  // torch's cosine_similarity: a zero row has cosine 0 with everything
constexpr int kPairs = 8;            // warps of a block
constexpr int kUnroll = 4;           // vectors of each row in flight

// Whether `edge` is one of cu[1..segments], which ascend; the whole warp asks for the same edge.
__device__ __forceinline__ bool is_edge(const int* __restrict__ cu, int64_t segments, int64_t edge) {
  const int lane = threadIdx.x & 31;
  int64_t low = 0, size = segments + 1;  // the last entry <= edge stands in cu[low .. low + size)
  while (size > 1) {
    const int64_t step = (size + 31) / 32;
    const bool below = lane * step < size && cu[low + lane * step] <= edge;
    const int reached = __popc(__ballot_sync(kAll, below)) - 1;
    low += reached * step;
    size = min(step, size - reached * step);
  }
  return low > 0 && cu[low] == edge;
}

template <class T>
__global__ void __launch_bounds__(kPairs * 32) routing_fwd(
    const T* __restrict__ q, const T* __restrict__ k, const int* __restrict__ cu, float* __restrict__ p,
    float* __restrict__ inverse_q, float* __restrict__ inverse_k, int64_t bytes, int64_t width, int64_t segments) {
  const int lane = threadIdx.x & 31;
  const int64_t t = int64_t(blockIdx.x) * kPairs + (threadIdx.x >> 5);
  if (t >= bytes) return;
  if (t + 1 == bytes || is_edge(cu, segments, t + 1)) {
    if (lane == 0) p[t] = 1.f, inverse_q[t] = 0.f, inverse_k[t] = 0.f;
    return;
  }
  const T *row_q = q + t * width, *row_k = k + (t + 1) * width;
  float dot = 0.f, qq = 0.f, kk = 0.f;
  for (int64_t base = lane * kVec; base < width; base += kUnroll * 32 * kVec) {
    float a[kUnroll][kVec], b[kUnroll][kVec];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t at = base + u * 32 * kVec;
      if (at < width) {
        load(row_q + at, a[u]);
        load(row_k + at, b[u]);
      } else {
        fill(a[u], 0.f), fill(b[u], 0.f);
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        dot = fmaf(a[u][i], b[u][i], dot);
        qq = fmaf(a[u][i], a[u][i], qq);
        kk = fmaf(b[u][i], b[u][i], kk);
      }
  }
  dot = warp_sum(dot), qq = warp_sum(qq), kk = warp_sum(kk);
  if (lane == 0) {
    const float iq = 1.f / fmaxf(sqrtf(qq), kCosineEps), ik = 1.f / fmaxf(sqrtf(kk), kCosineEps);
    const float raw = (1.f - dot * iq * ik) * 0.5f;
    p[t] = raw < 0.f ? 0.f : raw > 1.f ? 1.f : raw;  // comparisons, so that a NaN stays one
    inverse_q[t] = iq, inverse_k[t] = ik;
  }
}

// dq_t = -dp/2 · (k/|k| - cos · q/|q|) / |q|, dk_{t+1} alike; the pair of the row's last byte writes dk_0.
template <class T>
__global__ void __launch_bounds__(kPairs * 32) routing_bwd(
    const float* __restrict__ dp, const T* __restrict__ q, const T* __restrict__ k, const float* __restrict__ p,
    const float* __restrict__ inverse_q, const float* __restrict__ inverse_k, T* __restrict__ dq, T* __restrict__ dk,
    int64_t bytes, int64_t width) {
  const int lane = threadIdx.x & 31;
  const int64_t t = int64_t(blockIdx.x) * kPairs + (threadIdx.x >> 5);
  if (t >= bytes) return;
  const int64_t next = t + 1 == bytes ? 0 : t + 1;
  const T *row_q = q + t * width, *row_k = k + next * width;
  T *out_q = dq + t * width, *out_k = dk + next * width;
  const float iq = inverse_q[t], ik = inverse_k[t], cosine = 1.f - 2.f * p[t], scale = -0.5f * dp[t];
  if (iq == 0.f) {  // a segment's last byte: p is a constant there
    float zero[kVec];
    fill(zero, 0.f);
    for (int64_t at = lane * kVec; at < width; at += 32 * kVec) store(out_q + at, zero), store(out_k + at, zero);
    return;
  }
  const float cross = scale * iq * ik, own_q = -scale * cosine * iq * iq, own_k = -scale * cosine * ik * ik;
  for (int64_t base = lane * kVec; base < width; base += kUnroll * 32 * kVec) {
    float a[kUnroll][kVec], b[kUnroll][kVec];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t at = base + u * 32 * kVec;
      if (at >= width) continue;
      load(row_q + at, a[u]);
      load(row_k + at, b[u]);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t at = base + u * 32 * kVec;
      if (at >= width) continue;
      float gq[kVec], gk[kVec];
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        gq[i] = fmaf(cross, b[u][i], own_q * a[u][i]);
        gk[i] = fmaf(cross, a[u][i], own_k * b[u][i]);
      }
      store(out_q + at, gq);
      store(out_k + at, gk);
    }
  }
}

int bad_width(int64_t width) {
  return width > 0 && width % kVec == 0 ? 0 : fail(kBadArgument, "routing: the width is not a multiple of 8");
}

}  // namespace
}  // namespace mbk

// p, inverse_q, inverse_k: [bytes]. q, k: [bytes, width]. cu: [segments + 1].
MBK_API int mbk_routing_forward(const void* q, const void* k, const int* cu, float* p, float* inverse_q, float* inverse_k,
                            int64_t bytes, int64_t width, int64_t segments, int64_t dtype, void* stream) {
  using namespace mbk;
  if (const int bad = bad_width(width)) return bad;
  if (bytes == 0) return 0;
  return for_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    return launch(routing_fwd<T>, unsigned(ceil_div<int64_t>(bytes, kPairs)), kPairs * 32, 0, stream,
                  static_cast<const T*>(q), static_cast<const T*>(k), cu, p, inverse_q, inverse_k, bytes, width,
                  segments);
  });
}
MBK_API int mbk_routing_backward(const float* dp, const void* q, const void* k, const float* p, const float* inverse_q,
                            const float* inverse_k, void* dq, void* dk, int64_t bytes, int64_t width, int64_t dtype,
                            void* stream) {
  using namespace mbk;
  if (const int bad = bad_width(width)) return bad;
  if (bytes == 0) return 0;
  return for_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    return launch(routing_bwd<T>, unsigned(ceil_div<int64_t>(bytes, kPairs)), kPairs * 32, 0, stream, dp,
                  static_cast<const T*>(q), static_cast<const T*>(k), p, inverse_q, inverse_k, static_cast<T*>(dq),
                  static_cast<T*>(dk), bytes, width);
  });
}
