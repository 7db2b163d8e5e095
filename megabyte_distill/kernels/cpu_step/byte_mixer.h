// What the byte mixers have in common: the bytes of a call, a block, and the convolution that two of them have.
#pragma once
#include "vector.h"

namespace mbs {
namespace {

// The bytes of one call: K rows of T each, and how many bytes each row had read before.
struct Bytes {
  int64_t rows, length;
  const int64_t* slots;
  const int64_t* ids;
  const int64_t* read;  // by slot
  int64_t count() const { return rows * length; }
};

// A depthwise causal convolution: taps [K][C], what it remembers [slots][reach][C] in a ring.
struct Convolution {
  const float *taps, *bias;
  int64_t count, dilation, channels;
  void operator()(const float* x, float* past, int64_t read, int64_t first, int64_t last, float* y) const {
    const int64_t reach = (count - 1) * dilation;
    each(last - first, y + first, [&](int64_t i, int c) {
      const int64_t at = first + i;
      Vec sum = load(x + at, c) * load(taps + (count - 1) * channels + at, c);
      if (bias) sum += load(bias + at, c);
      for (int64_t k = 1; k < count; k++) {
        const float* earlier = past + ((read - k * dilation) % reach + reach) % reach * channels;
        sum += load(earlier + at, c) * load(taps + (count - 1 - k) * channels + at, c);
      }
      return sum;
    });
  }
  void remember(const float* x, float* past, int64_t read, int64_t first, int64_t last) const {
    const int64_t reach = (count - 1) * dilation;
    if (reach) std::memcpy(past + read % reach * channels + first, x + first, sizeof(float) * (last - first));
  }
};

// A block of the byte mixers. It reads and writes the residual stream x [K·T, D] and keeps a state a slot.
struct Block {
  Numbers state, saved, trace, work;
  int64_t state_size = 0;
  virtual ~Block() = default;
  // Buffers for one call; before the parallel region.
  virtual void prepare(const Bytes& bytes) = 0;
  // Inside the parallel region; `normed` and `more` are scratch of K·T rows.
  virtual void run(const Bytes& bytes, float* x, float* normed, float* more) = 0;
  // Go through the first `count` bytes of the row-th row of the last call again, for the state alone.
  virtual void replay(int64_t row, int64_t length, int64_t slot, int64_t read, int64_t count) = 0;
  virtual int64_t scratch() const = 0;
  float* of(int64_t slot) { return state.data() + slot * state_size; }
};

}  // namespace
}  // namespace mbs
