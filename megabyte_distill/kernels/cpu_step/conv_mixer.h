// The convolution mixer (model/conv_mixer.py).
#pragma once
#include "byte_mixer.h"
#include "description.h"

namespace mbs {
namespace {

struct ConvBlock : Block {
  Norm norm;
  Dense value, gate, out;
  Convolution conv;
  Norm ffn_norm;
  Gated ffn;
  explicit ConvBlock(Reader& in, int64_t slots)
      : norm(in), value(in.dense()), gate(in.dense()), out(in.dense()), conv(), ffn_norm(after_conv(in)), ffn(in) {
    state_size = (conv.count - 1) * conv.dilation * conv.channels;
    state.resize(slots * state_size);
  }
  Reader& after_conv(Reader& in) {
    conv.taps = in.pointer();
    conv.bias = nullptr;
    conv.count = in.number();
    conv.dilation = in.number();
    conv.channels = value.out;
    return in;
  }
  int64_t scratch() const override { return ffn.hidden_size(); }
  void prepare(const Bytes& bytes) override {
    room(trace, bytes.count() * conv.channels);
    room(work, bytes.count() * 2 * conv.channels);
  }
  void run(const Bytes& bytes, float* x, float* normed, float* more) override {
    const int64_t width = conv.channels, count = bytes.count();
    float *values = trace.data(), *gated = work.data();  // gated: [mixed | gate]
    norm(count, x, normed);
    dense(value, count, normed, value.in, values, width);
    dense(gate, count, normed, gate.in, gated + width, 2 * width);
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t row = 0; row < bytes.rows; row++) {
      const int64_t slot = bytes.slots[row];
      for (int64_t t = 0; t < bytes.length; t++) {
        const int64_t at = row * bytes.length + t, read = bytes.read[slot] + t;
        conv(values + at * width, of(slot), read, 0, width, gated + at * 2 * width);
        conv.remember(values + at * width, of(slot), read, 0, width);
      }
    }
    swiglu(count, gated, width);
    dense(out, count, gated, 2 * width, x, out.out, true);
#pragma omp barrier
    ffn_norm(count, x, normed);
    ffn(count, normed, more, x, true);
  }
  void replay(int64_t row, int64_t length, int64_t slot, int64_t read, int64_t count) override {
    for (int64_t t = 0; t < count; t++)
      conv.remember(trace.data() + (row * length + t) * conv.channels, of(slot), read + t, 0, conv.channels);
  }
};

}  // namespace
}  // namespace mbs
