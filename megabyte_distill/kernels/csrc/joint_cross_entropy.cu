// F5: cross-entropy over the 512 joint classes, against labels and, in the same pass, against distributions.
//
// A warp owns a row of logits. The forward keeps only the row's log-sum-exp; the backward recomputes the softmax and
// may write the gradient over the logits: one read forward, one read and one write backward, and no second buffer.
#include "kernel.h"

namespace mbk {
namespace {

constexpr int kClasses = 512;
constexpr int kRows = 4;  // warps of a block
constexpr int kVecs = kClasses / (32 * kVec);

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int offset = 16; offset; offset >>= 1) x = fmaxf(x, __shfl_xor_sync(kAll, x, offset));
  return x;
}

// This lane's classes of a row: [v][i] is class first_class(v) + i.
__device__ __forceinline__ int first_class(int v) { return (v * 32 + (threadIdx.x & 31)) * kVec; }
template <class T>
__device__ __forceinline__ void load_classes(const T* row, float (&x)[kVecs][kVec]) {
#pragma unroll
  for (int v = 0; v < kVecs; ++v) load(row + first_class(v), x[v]);
}

// The same of a row that this kernel may overwrite: not through the read-only path.
__device__ __forceinline__ void load_mutable(const float* row, float (&x)[kVecs][kVec]) {
#pragma unroll
  for (int v = 0; v < kVecs; ++v) {
    const float4* from = reinterpret_cast<const float4*>(row + first_class(v));
    const float4 a = from[0], b = from[1];
    x[v][0] = a.x, x[v][1] = a.y, x[v][2] = a.z, x[v][3] = a.w, x[v][4] = b.x, x[v][5] = b.y, x[v][6] = b.z, x[v][7] = b.w;
  }
}
__device__ __forceinline__ void load_mutable(const bf16* row, float (&x)[kVecs][kVec]) {
#pragma unroll
  for (int v = 0; v < kVecs; ++v) {
    const uint4 q = *reinterpret_cast<const uint4*>(row + first_class(v));
    x[v][0] = bf16_low(q.x), x[v][1] = bf16_high(q.x), x[v][2] = bf16_low(q.y), x[v][3] = bf16_high(q.y);
    x[v][4] = bf16_low(q.z), x[v][5] = bf16_high(q.z), x[v][6] = bf16_low(q.w), x[v][7] = bf16_high(q.w);
  }
}

template <class T, bool SOFT>
__global__ void __launch_bounds__(kRows * 32, 1) joint_ce_fwd(
    const T* __restrict__ logits, const int64_t* __restrict__ labels, const float* __restrict__ distribution,
    float* __restrict__ hard, float* __restrict__ soft, float* __restrict__ log_sum, int64_t rows) {
  const int64_t row = int64_t(blockIdx.x) * kRows + (threadIdx.x >> 5);
  if (row >= rows) return;
  float x[kVecs][kVec], target[kVecs][kVec];
  load_classes(logits + row * kClasses, x);
  if (SOFT) load_classes(distribution + row * kClasses, target);
  const int64_t label = labels ? labels[row] : -1;
  float top = -INFINITY;
#pragma unroll
  for (int v = 0; v < kVecs; ++v)
#pragma unroll
    for (int i = 0; i < kVec; ++i) top = fmaxf(top, x[v][i]);
  top = warp_max(top);
  float sum = 0.f, expected = 0.f, weight = 0.f;
#pragma unroll
  for (int v = 0; v < kVecs; ++v)
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      const float shifted = x[v][i] - top;
      sum += expf(shifted);
      if (SOFT) expected = fmaf(target[v][i], shifted, expected), weight += target[v][i];
    }
  const float log_shifted = logf(warp_sum(sum));
  if (SOFT) expected = warp_sum(expected), weight = warp_sum(weight);
  if ((threadIdx.x & 31) == 0) {
    log_sum[row] = top + log_shifted;
    if (SOFT) soft[row] = weight * log_shifted - expected;
    const bool is_class = label >= 0 && label < kClasses;  // NaN for what is none, and no read
    if (labels) hard[row] = is_class ? log_shifted - (to_float(logits[row * kClasses + label]) - top) : NAN;
  }
}

// dx = (on_hard + on_soft · Σ target) · softmax - on_soft · target - on_hard at the label. dx may be the logits' own
// memory: a thread reads what it overwrites, and nothing else.
template <class T, bool SOFT>
__global__ void __launch_bounds__(kRows * 32, 1) joint_ce_bwd(
    const T* logits, const int64_t* __restrict__ labels, const float* __restrict__ distribution,
    const float* __restrict__ log_sum, const float* __restrict__ grad_hard, const float* __restrict__ grad_soft, T* dx,
    int64_t rows) {
  const int64_t row = int64_t(blockIdx.x) * kRows + (threadIdx.x >> 5);
  if (row >= rows) return;
  const float on_hard = labels ? grad_hard[row] : 0.f, on_soft = SOFT ? grad_soft[row] : 0.f;
  const bool silent = on_hard == 0.f && on_soft == 0.f;  // PAD and masked bytes: nothing is read
  float x[kVecs][kVec], target[kVecs][kVec], weight = on_hard;
  if (!silent) load_mutable(logits + row * kClasses, x);
  if (SOFT && !silent) {
    load_classes(distribution + row * kClasses, target);
    float sum = 0.f;
#pragma unroll
    for (int v = 0; v < kVecs; ++v)
#pragma unroll
      for (int i = 0; i < kVec; ++i) sum += target[v][i];
    weight = fmaf(on_soft, warp_sum(sum), on_hard);
  }
  const float total = log_sum[row];
  const int64_t label = labels ? labels[row] : -1;
#pragma unroll
  for (int v = 0; v < kVecs; ++v) {
    float out[kVec];
    fill(out, 0.f);
    if (!silent)
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        out[i] = weight * expf(x[v][i] - total);
        if (SOFT) out[i] = fmaf(-on_soft, target[v][i], out[i]);
        if (first_class(v) + i == label) out[i] -= on_hard;
      }
    store(dx + row * kClasses + first_class(v), out);
  }
}

}  // namespace
}  // namespace mbk

// logits: [rows, 512]. log_sum: [rows]. labels: [rows] or null, hard: [rows] beside them. distribution: [rows, 512] fp32
// or null, soft: [rows] beside it.
MBK_API int mbk_joint_cross_entropy_forward(const void* logits, const int64_t* labels, const float* distribution, float* hard,
                             float* soft, float* log_sum, int64_t rows, int64_t dtype, void* stream) {
  using namespace mbk;
  if (rows == 0) return 0;
  return for_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    return launch(distribution ? joint_ce_fwd<T, true> : joint_ce_fwd<T, false>, unsigned(ceil_div<int64_t>(rows, kRows)),
                  kRows * 32, 0, stream, static_cast<const T*>(logits), labels, distribution, hard, soft, log_sum, rows);
  });
}
// grad_hard: [rows] where there are labels; grad_soft: [rows] where there is a distribution. dx: [rows, 512], may be the logits.
MBK_API int mbk_joint_cross_entropy_backward(const void* logits, const int64_t* labels, const float* distribution, const float* log_sum,
                             const float* grad_hard, const float* grad_soft, void* dx, int64_t rows, int64_t dtype,
                             void* stream) {
  using namespace mbk;
  if (rows == 0) return 0;
  return for_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    return launch(distribution ? joint_ce_bwd<T, true> : joint_ce_bwd<T, false>, unsigned(ceil_div<int64_t>(rows, kRows)),
                  kRows * 32, 0, stream, static_cast<const T*>(logits), labels, distribution, log_sum, grad_hard,
                  grad_soft, static_cast<T*>(dx), rows);
  });
}
