// Rows of fp32 on a CPU: vectors, matrix products of few rows, norms and activations.
//
// Everything here runs inside one parallel region: "omp for" shares a loop among the threads that reach it, and what says
// so leaves the barrier behind it to the caller.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace mbs {

using Numbers = std::vector<float>;

// Where so many numbers can be put; what stood there stays.
inline float* room(Numbers& buffer, int64_t size) {
  if (int64_t(buffer.size()) < size) buffer.resize(size);
  return buffer.data();
}

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
// By the tanh approximation: (1 + tanh(u)) / 2 is 1 / (1 + e^(−2u)), with u = √(2/π) (x + 0.044715 x³).
inline Vec gelu(Vec x) { return x / (1.0f + exp(-1.5957691216f * (x + 0.044715f * x * x * x))); }

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

// R rows of x against four rows of a matrix: y [R, 4].
template <int R>
inline void products(const float* w, int64_t n, const float* x, int64_t stride, float* y) {
  Vec sum[R][kOutputs] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    Vec own[kOutputs];
    for (int o = 0; o < kOutputs; o++) own[o] = load(w + o * n + i);
    for (int r = 0; r < R; r++) {
      const Vec value = load(x + r * stride + i);
      for (int o = 0; o < kOutputs; o++) sum[r][o] += value * own[o];
    }
  }
  for (int r = 0; r < R; r++) {
    for (int o = 0; o < kOutputs; o++) {
      float value = total(sum[r][o]);
      for (int64_t rest = i; rest < n; rest++) value += x[r * stride + rest] * w[o * n + rest];
      y[r * kOutputs + o] = value;
    }
  }
}

inline void products(int rows, const float* w, int64_t n, const float* x, int64_t stride, float* y) {
  switch (rows) {
    case 1: return products<1>(w, n, x, stride, y);
    case 2: return products<2>(w, n, x, stride, y);
    case 3: return products<3>(w, n, x, stride, y);
    default: return products<4>(w, n, x, stride, y);
  }
}

// Many rows at once stand in the lanes instead: no sums across lanes, each weight read once for all of them.
#if defined(__AVX512F__)
constexpr int kTall = 12;  // outputs at once, so that their sums stay in registers
#else
constexpr int kTall = 3;
#endif
constexpr int64_t kRows = 2 * kLanes;  // rows of a block

// x [n][lanes] of a block of rows, `lanes` a multiple of 8 and at most kRows, against O rows of a matrix: y [O][lanes].
template <int O, class V, int Count>
inline void tall_products(const float* w, int64_t n, const float* x, float* y) {
  V sum[O][Count] = {};
  for (int64_t i = 0; i < n; i++) {
    V own[Count];
    for (int v = 0; v < Count; v++) std::memcpy(&own[v], x + (i * Count + v) * (sizeof(V) / 4), sizeof(V));
    for (int o = 0; o < O; o++)
      for (int v = 0; v < Count; v++) sum[o][v] += own[v] * w[o * n + i];
  }
  std::memcpy(y, sum, sizeof sum);
}
template <int O>
inline void tall_products(int64_t lanes, const float* w, int64_t n, const float* x, float* y) {
  typedef float Half __attribute__((vector_size(2 * kLanes)));
  if (lanes == kLanes / 2) return tall_products<O, Half, 1>(w, n, x, y);
  if (lanes == kLanes) return tall_products<O, Vec, 1>(w, n, x, y);
  return tall_products<O, Vec, 2>(w, n, x, y);
}
inline int64_t lanes_of(int64_t rows) { return rows <= kLanes / 2 ? kLanes / 2 : rows <= kLanes ? kLanes : kRows; }

// Where a row's result goes: y[row][output], or added to what is there.
struct Target {
  const Dense& d;
  float* y;
  int64_t stride;
  bool adds;
  void put(int64_t row, int64_t output, float value) const {
    value += d.bias ? d.bias[output] : 0.0f;
    float* own = y + row * stride + output;
    *own = adds ? *own + value : value;
  }
};

inline void dense_of_many(const Dense& d, int64_t count, const float* x, int64_t x_stride, const Target& target) {
  static thread_local Numbers turned;  // each thread's own: the copy is small beside the products
  const int64_t blocks = (count + kRows - 1) / kRows;
  room(turned, blocks * kRows * d.in);
  for (int64_t block = 0; block < blocks; block++) {
    const int64_t rows = count - block * kRows < kRows ? count - block * kRows : kRows, lanes = lanes_of(rows);
    float* own = turned.data() + block * kRows * d.in;
    for (int64_t i = 0; i < d.in; i++)
      for (int64_t r = 0; r < lanes; r++)
        own[i * lanes + r] = r < rows ? x[(block * kRows + r) * x_stride + i] : 0.0f;
  }
#pragma omp for schedule(static) nowait
  for (int64_t first = 0; first < d.out; first += kTall) {
    const int outputs = int(d.out - first < kTall ? d.out - first : kTall);
    for (int64_t block = 0; block < blocks; block++) {
      const int64_t rows = count - block * kRows < kRows ? count - block * kRows : kRows, lanes = lanes_of(rows);
      const float *own = turned.data() + block * kRows * d.in, *w = d.weight + first * d.in;
      float found[kTall * kRows];
      if (outputs == kTall) tall_products<kTall>(lanes, w, d.in, own, found);
      else
        for (int o = 0; o < outputs; o++) tall_products<1>(lanes, w + o * d.in, d.in, own, found + o * lanes);
      for (int64_t r = 0; r < rows; r++)
        for (int o = 0; o < outputs; o++) target.put(block * kRows + r, first + o, found[o * lanes + r]);
    }
  }
}

// y[m] = x[m] weightᵀ + bias, or added to y[m] where `adds`; shared among threads, no barrier behind it.
inline void dense(const Dense& d, int64_t count, const float* x, int64_t x_stride, float* y, int64_t y_stride,
                  bool adds = false) {
  const Target target{d, y, y_stride, adds};
  if (count > kOutputs) return dense_of_many(d, count, x, x_stride, target);
#pragma omp for schedule(static) nowait
  for (int64_t first = 0; first < d.out; first += kOutputs) {
    const int outputs = int(d.out - first < kOutputs ? d.out - first : kOutputs);
    float found[4 * kOutputs];
    if (outputs == kOutputs) products(int(count), d.weight + first * d.in, d.in, x, x_stride, found);
    for (int64_t r = 0; r < count; r++)
      for (int o = 0; o < outputs; o++)
        target.put(r, first + o, outputs == kOutputs ? found[r * kOutputs + o]
                                                     : dot(x + r * x_stride, d.weight + (first + o) * d.in, d.in));
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
