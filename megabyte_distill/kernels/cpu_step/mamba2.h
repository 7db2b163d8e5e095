// The Mamba-2 mixer (model/mamba2.py).
#pragma once
#include <algorithm>

#include "byte_mixer.h"
#include "description.h"

namespace mbs {
namespace {

struct MambaBlock : Block {
  Norm norm;
  Dense z, x_in, b_in, c_in, dt_in, out;
  Convolution conv;  // over [x | b | c]
  const float *dt_bias, *decay, *skip;
  int64_t heads, features, states, inner, columns, ring;
  Norm gated_norm;
  explicit MambaBlock(Reader& in, int64_t slots)
      : norm(in), z(in.dense()), x_in(in.dense()), b_in(in.dense()), c_in(in.dense()), dt_in(in.dense()),
        out(in.dense()), conv(), gated_norm(after_numbers(in)) {
    state_size = ring + heads * features * states;
    state.resize(slots * state_size);
  }
  Reader& after_numbers(Reader& in) {
    conv.taps = in.pointer();
    conv.bias = in.pointer();
    conv.count = in.number();
    conv.dilation = 1;
    dt_bias = in.pointer();
    decay = in.pointer();
    skip = in.pointer();
    inner = x_in.out;
    heads = dt_in.out;
    features = inner / heads;
    states = b_in.out;
    conv.channels = inner + 2 * states;
    columns = conv.channels + heads;  // [x | b | c | dt]
    ring = (conv.count - 1) * conv.channels;
    return in;
  }
  int64_t scratch() const override { return 0; }
  void prepare(const Bytes& bytes) override {
    room(trace, bytes.count() * columns);
    room(work, bytes.count() * (2 * inner + conv.channels));
    mixed_at = bytes.count() * inner;
  }
  void run(const Bytes& bytes, float* x, float* normed, float*) override {
    const int64_t count = bytes.count(), channels = conv.channels;
    float *raw = trace.data(), *gates = work.data(), *mixed = gates + mixed_at, *y = mixed + count * channels;
    norm(count, x, normed);
    dense(z, count, normed, z.in, gates, inner);
    dense(x_in, count, normed, z.in, raw, columns);
    dense(b_in, count, normed, z.in, raw + inner, columns);
    dense(c_in, count, normed, z.in, raw + inner + states, columns);
    dense(dt_in, count, normed, z.in, raw + channels, columns);
#pragma omp barrier
    const int64_t parts = (channels + kPart - 1) / kPart;
#pragma omp for collapse(2) schedule(static)
    for (int64_t row = 0; row < bytes.rows; row++)
      for (int64_t part = 0; part < parts; part++) convolve(bytes, row, part, raw, mixed);
#pragma omp for collapse(2) schedule(static)
    for (int64_t row = 0; row < bytes.rows; row++)
      for (int64_t head = 0; head < heads; head++)
        scan(raw, mixed, row, bytes.length, bytes.slots[row], head, bytes.length, gates, y);
#pragma omp for schedule(static)
    for (int64_t at = 0; at < count; at++)
      rms_norm(y + at * inner, gated_norm.weight, gated_norm.eps, inner, gates + at * inner);
    dense(out, count, gates, inner, x, out.out, true);
#pragma omp barrier
  }
  static constexpr int64_t kPart = 256;
  void convolve(const Bytes& bytes, int64_t row, int64_t part, const float* raw, float* mixed) {
    const int64_t slot = bytes.slots[row], channels = conv.channels;
    const int64_t first = part * kPart, last = std::min(channels, first + kPart);
    for (int64_t t = 0; t < bytes.length; t++) {
      const int64_t at = row * bytes.length + t, read = bytes.read[slot] + t;
      float* y = mixed + at * channels;
      conv(raw + at * columns, of(slot), read, first, last, y);
      conv.remember(raw + at * columns, of(slot), read, first, last);
      each(last - first, y + first, [&](int64_t i, int c) { return silu(load(y + first + i, c)); });
    }
  }
  // One head of one row through `count` bytes; y null where the state alone is wanted.
  void scan(const float* raw, const float* mixed, int64_t row, int64_t length, int64_t slot, int64_t head,
            int64_t count, const float* gates, float* y) {
    float* states_of = of(slot) + ring + head * features * states;
    for (int64_t t = 0; t < count; t++) {
      const int64_t at = row * length + t;
      const float *x = mixed + at * conv.channels, *b = x + inner, *c = b + states;
      const float wide = raw[at * columns + conv.channels + head] + dt_bias[head];
      const float dt = wide > 20.0f ? wide : std::log1p(std::exp(wide));
      const float kept = std::exp(dt * decay[head]);
      for (int64_t f = 0; f < features; f++) {
        const int64_t channel = head * features + f;
        const float written = dt * x[channel];
        float* s = states_of + f * states;
        Vec sum{};
        float rest = 0;
        int64_t n = 0;
        for (; n + kLanes <= states; n += kLanes) {
          const Vec next = load(s + n) * kept + load(b + n) * written;
          store(s + n, next);
          sum += next * load(c + n);
        }
        for (; n < states; n++) {
          s[n] = s[n] * kept + b[n] * written;
          rest += s[n] * c[n];
        }
        if (y) y[at * inner + channel] = total(sum) + rest + x[channel] * skip[head];
      }
      if (y) {
        float* own = y + at * inner + head * features;
        const float* gate = gates + at * inner + head * features;
        each(features, own, [&](int64_t i, int c) { return load(own + i, c) * silu(load(gate + i, c)); });
      }
    }
  }
  void replay(int64_t row, int64_t length, int64_t slot, int64_t read, int64_t count) override {
    const float *raw = trace.data(), *mixed = work.data() + mixed_at;
    for (int64_t t = 0; t < count; t++)
      conv.remember(raw + (row * length + t) * columns, of(slot), read + t, 0, conv.channels);
    for (int64_t head = 0; head < heads; head++) scan(raw, mixed, row, length, slot, head, count, nullptr, nullptr);
  }
  int64_t mixed_at = 0;  // where the convolved inputs lie in `work`
};

}  // namespace
}  // namespace mbs
