// Rows of fp32 on a CPU: vectors, matrix products of few rows, norms and activations.
//
// Everything here runs inside one parallel region: "omp for" shares a loop among the threads that reach it, and what says
// so leaves the barrier behind it to the caller.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace mbs {

constexpr int kLanes = 16;
typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef float VecAt __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef int32_t IntVec __attribute__((vector_size(4 * kLanes)));

inline Vec load(const float* p) { return *reinterpret_cast<const VecAt*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<VecAt*>(p) = v; }
inline float total(Vec v) {
  typedef float Half __attribute__((vector_size(2 * kLanes)));
  typedef float Quarter __attribute__((vector_size(kLanes)));
  const Half half = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                    __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  const Quarter quarter = __builtin_shufflevector(half, half, 0, 1, 2, 3) + __builtin_shufflevector(half, half, 4, 5, 6, 7);
  return (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
}

// e^x to about two units in the last place, x held in what fp32 can say.
inline Vec exp(Vec x) {
  x = x > 88.0f ? Vec{} + 88.0f : x;
  x = x < -87.0f ? Vec{} - 87.0f : x;
  const Vec shifted = x * 1.44269504f + 12582912.0f;  // rounds: 1.5 * 2^23 has no fraction bits left
  const Vec n = shifted - 12582912.0f;
  const Vec r = (x - n * 0.693145751953125f) - n * 1.428606765330187e-6f;
  Vec p = Vec{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const IntVec power = (__builtin_convertvector(n, IntVec) + 127) << 23;
  return p * (Vec)power;  // the bits, as a float
}
inline Vec silu(Vec x) { return x / (1.0f + exp(-x)); }

// f(first, vector) over n numbers; the last vector may hold fewer than it has room for.
template <class F>
inline void each(int64_t n, float* out, F f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, f(i, kLanes));
  if (i < n) {
    const Vec last = f(i, int(n - i));
    std::memcpy(out + i, &last, sizeof(float) * (n - i));
  }
}
inline Vec load(const float* p, int count) {
  if (count == kLanes) return load(p);
  Vec v{};
  std::memcpy(&v, p, sizeof(float) * count);
  return v;
}

inline float dot(const float* a, const float* b, int64_t n) {
  Vec sum{};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) sum += load(a + i) * load(b + i);
  float rest = total(sum);
  for (; i < n; i++) rest += a[i] * b[i];
  return rest;
}

// A matrix [out, in], and a bias [out] or null.
struct Dense {
  const float* weight;
  const float* bias;
  int64_t in, out;
};

constexpr int kOutputs = 4;

// R rows of x against four rows of a matrix that lie `between` apart: y [R, 4].
template <int R>
inline void products(const float* w, int64_t n, int64_t between, const float* x, int64_t stride, float* y) {
  Vec sum[R][kOutputs] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    Vec own[kOutputs];
    for (int o = 0; o < kOutputs; o++) own[o] = load(w + o * between + i);
    for (int r = 0; r < R; r++) {
      const Vec value = load(x + r * stride + i);
      for (int o = 0; o < kOutputs; o++) sum[r][o] += value * own[o];
    }
  }
  for (int r = 0; r < R; r++) {
    for (int o = 0; o < kOutputs; o++) {
      float value = total(sum[r][o]);
      for (int64_t rest = i; rest < n; rest++) value += x[r * stride + rest] * w[o * between + rest];
      y[r * kOutputs + o] = value;
    }
  }
}

inline void products(int rows, const float* w, int64_t n, int64_t between, const float* x, int64_t stride, float* y) {
  switch (rows) {
    case 1: return products<1>(w, n, between, x, stride, y);
    case 2: return products<2>(w, n, between, x, stride, y);
    case 3: return products<3>(w, n, between, x, stride, y);
    default: return products<4>(w, n, between, x, stride, y);
  }
}

// y[m] = x[m] weightᵀ + bias, or added to y[m] where `adds`; shared among threads, no barrier behind it.
inline void dense(const Dense& d, int64_t count, const float* x, int64_t x_stride, float* y, int64_t y_stride,
                  bool adds = false) {
#pragma omp for schedule(static) nowait
  for (int64_t first = 0; first < d.out; first += kOutputs) {
    const int outputs = int(d.out - first < kOutputs ? d.out - first : kOutputs);
    for (int64_t m = 0; m < count; m += 4) {
      const int rows = int(count - m < 4 ? count - m : 4);
      float found[4 * kOutputs];
      if (outputs == kOutputs) {
        products(rows, d.weight + first * d.in, d.in, d.in, x + m * x_stride, x_stride, found);
      } else {
        for (int r = 0; r < rows; r++)
          for (int o = 0; o < outputs; o++)
            found[r * kOutputs + o] = dot(x + (m + r) * x_stride, d.weight + (first + o) * d.in, d.in);
      }
      for (int r = 0; r < rows; r++) {
        for (int o = 0; o < outputs; o++) {
          const float value = found[r * kOutputs + o] + (d.bias ? d.bias[first + o] : 0.0f);
          float* target = y + (m + r) * y_stride + first + o;
          *target = adds ? *target + value : value;
        }
      }
    }
  }
}

// x / rms(x) * weight of one row.
inline void rms_norm(const float* x, const float* weight, float eps, int64_t n, float* y) {
  const float scale = 1.0f / std::sqrt(dot(x, x, n) / float(n) + eps);
  each(n, y, [&](int64_t i, int c) { return load(x + i, c) * scale * load(weight + i, c); });
}

inline void rms_norms(int64_t count, const float* x, const float* weight, float eps, int64_t n, float* y) {
#pragma omp for schedule(static)
  for (int64_t m = 0; m < count; m++) rms_norm(x + m * n, weight, eps, n, y + m * n);
}

// value * silu(gate) of rows [value | gate], into the value's place.
inline void swiglu(int64_t count, float* rows, int64_t hidden) {
#pragma omp for schedule(static)
  for (int64_t m = 0; m < count; m++) {
    float* value = rows + m * 2 * hidden;
    const float* gate = value + hidden;
    each(hidden, value, [&](int64_t i, int c) { return load(value + i, c) * silu(load(gate + i, c)); });
  }
}

}  // namespace mbs
