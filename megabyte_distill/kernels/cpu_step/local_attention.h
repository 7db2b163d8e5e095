// Attention to the last bytes of a window (model/local_attention.py).
#pragma once
#include <algorithm>

#include "attention.h"
#include "byte_mixer.h"
#include "description.h"
#include "rotary.h"

namespace mbs {
namespace {

struct AttentionBlock : Block {
  Norm norm;
  Dense query, key, value, out;
  int64_t head_dim, window;
  const float* frequencies;
  int64_t width, heads;
  float scale;
  Numbers turns;
  // State: keys of the last bytes in a ring, head by head, then their values.
  explicit AttentionBlock(Reader& in, int64_t slots)
      : norm(in), query(in.dense()), key(in.dense()), value(in.dense()), out(in.dense()), head_dim(in.number()),
        window(in.number()), frequencies(in.pointer()), width(query.out), heads(width / head_dim),
        scale(1.0f / std::sqrt(float(head_dim))) {
    state_size = heads * (keys_size(padded(window), head_dim) + values_size(padded(window), head_dim));
    state.resize(slots * state_size);
  }
  float* keys_of(float* ring, int64_t head) const { return ring + head * keys_size(padded(window), head_dim); }
  float* values_of(float* ring, int64_t head) const {
    return keys_of(ring, heads) + head * values_size(padded(window), head_dim);
  }
  int64_t scratch() const override { return 0; }
  void prepare(const Bytes& bytes) override {
    room(trace, bytes.count() * 3 * width);  // [query | key | value]
    room(work, bytes.count() * width);
    room(turns, bytes.count() * head_dim);
  }
  void run(const Bytes& bytes, float* x, float* normed, float*) override {
    const int64_t count = bytes.count();
    float *projected = trace.data(), *mixed = work.data();
    norm(count, x, normed);
    dense(query, count, normed, query.in, projected, 3 * width);
    dense(key, count, normed, query.in, projected + width, 3 * width);
    dense(value, count, normed, query.in, projected + 2 * width, 3 * width);
#pragma omp for schedule(static)
    for (int64_t at = 0; at < count; at++)
      turn_byte(bytes.read[bytes.slots[at / bytes.length]] + at % bytes.length, head_dim / 2, frequencies,
                turns.data() + at * head_dim);
#pragma omp for collapse(2) schedule(static)
    for (int64_t row = 0; row < bytes.rows; row++)
      for (int64_t head = 0; head < heads; head++)
        for (int64_t t = 0; t < bytes.length; t++) {
          const int64_t at = row * bytes.length + t, read = bytes.read[bytes.slots[row]] + t;
          float *own = projected + at * 3 * width + head * head_dim, *ring = of(bytes.slots[row]);
          rotate(own, head_dim / 2, turns.data() + at * head_dim);
          rotate(own + width, head_dim / 2, turns.data() + at * head_dim);
          remember(own, ring, head, read);
          const Past past{keys_of(ring, head), values_of(ring, head), 0, std::min(read + 1, window), head_dim, scale};
          attend(1, &own, past, mixed + at * width + head * head_dim);
        }
    dense(out, count, mixed, width, x, out.out, true);
#pragma omp barrier
  }
  // Key and value of one head, which lie behind its query; what they replace is out of reach.
  void remember(const float* own, float* ring, int64_t head, int64_t read) const {
    store_key(own + width, read % window, head_dim, keys_of(ring, head));
    store_value(own + 2 * width, read % window, head_dim, values_of(ring, head));
  }
  void replay(int64_t row, int64_t length, int64_t slot, int64_t read, int64_t count) override {
    for (int64_t t = 0; t < count; t++)
      for (int64_t head = 0; head < heads; head++)
        remember(trace.data() + (row * length + t) * 3 * width + head * head_dim, of(slot), head, read + t);
  }
};

}  // namespace
}  // namespace mbs
