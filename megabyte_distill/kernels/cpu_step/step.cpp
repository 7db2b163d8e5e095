// The steps of an engine on a CPU in fp32, each a single call: encoder, decoder, backbone, over some of R slots.
//
// What they compute is model/'s: byte_encoder.py, byte_decoder.py, conv_mixer.py, mamba2.py, local_attention.py and the
// teacher's layers; the weights are the modules' own memory. inference/engine_cpu.py writes the description that `Reader`
// reads, in the order in which the constructors take it. The headers beside this file are its parts and no one else's:
// all is compiled as one, so that the compiler knows every caller.
#include <algorithm>
#include <vector>

#include "backbone.h"
#include "byte_stack.h"
#include "description.h"
#include "ngrams.h"

#define MBS_API extern "C" __attribute__((visibility("default")))

namespace mbs {
namespace {

struct Model {
  int64_t slots, byte_width, width;
  const float* encoder_table;
  Ngrams ngrams;
  Stack encoder;
  Norm encoder_norm;
  Gated head;
  Dense residual;
  Gated entry;
  const float* decoder_table;
  Stack decoder;
  Norm decoder_norm;
  Dense classes;
  Backbone backbone;
  std::vector<int64_t> traced;  // bytes of the last call of the encoder, for replays
  Numbers x, normed, hidden, wide;
  explicit Model(Reader& in)
      : slots(in.number()), byte_width(in.number()), width(in.number()), encoder_table(in.pointer()),
        ngrams(in, slots), encoder(in, slots), encoder_norm(in), head(in), residual(in.dense()), entry(in),
        decoder_table(in.pointer()), decoder(in, slots), decoder_norm(in), classes(in.dense()), backbone(in, slots) {}

  void prepare(Stack& stack, const Bytes& bytes) {
    const int64_t most = std::max({stack.scratch(), head.hidden_size(), entry.hidden_size()});
    room(x, bytes.count() * byte_width);
    room(normed, bytes.count() * byte_width);
    room(hidden, bytes.count() * most);
    room(wide, bytes.count() * width);
    stack.prepare(bytes);
  }
  void encode(int64_t rows, int64_t length, const int64_t* places, const int64_t* ids, float* r, int threads) {
    const Bytes bytes{rows, length, places, ids, encoder.read.data()};
    prepare(encoder, bytes);
    traced.assign(ids, ids + bytes.count());
    for (int64_t at = 0; at < bytes.count(); at++) {
      float* own = x.data() + at * byte_width;
      std::copy_n(encoder_table + ids[at] * byte_width, byte_width, own);
      if (ngrams.sizes.empty()) continue;
      ngrams.push(places[at / length], ids[at]);
      ngrams.add(places[at / length], byte_width, own);
    }
#pragma omp parallel num_threads(threads)
    {
      encoder.run(bytes, x.data(), normed.data(), hidden.data());
      encoder_norm(bytes.count(), x.data(), normed.data());
      head(bytes.count(), normed.data(), hidden.data(), r, false);
    }
    for (int64_t row = 0; row < rows; row++) encoder.read[places[row]] += length;
  }
  void decode(int64_t rows, int64_t length, const int64_t* places, const int64_t* ids, const float* s, const float* r,
              float* logits, int threads) {
    const Bytes bytes{rows, length, places, ids, decoder.read.data()};
    prepare(decoder, bytes);
    const int64_t count = bytes.count();
    std::copy_n(s, count * width, wide.data());
#pragma omp parallel num_threads(threads)
    {
      dense(residual, count, r, width, wide.data(), width, true);
#pragma omp barrier
      entry(count, wide.data(), hidden.data(), x.data(), false);
#pragma omp for schedule(static)
      for (int64_t at = 0; at < count; at++) {
        float* own = x.data() + at * byte_width;
        const float* table = decoder_table + ids[at] * byte_width;
        for (int64_t i = 0; i < byte_width; i++) own[i] += table[i];
      }
      decoder.run(bytes, x.data(), normed.data(), hidden.data());
      decoder_norm(count, x.data(), normed.data());
      dense(classes, count, normed.data(), byte_width, logits, classes.out);
    }
    for (int64_t row = 0; row < rows; row++) decoder.read[places[row]] += length;
  }
  void copy(int64_t slot, bool back) {
    encoder.copy(slot, back);
    decoder.copy(slot, back);
    auto &from = back ? ngrams.saved : ngrams.recent, &to = back ? ngrams.recent : ngrams.saved;
    std::copy_n(from.data() + slot * Ngrams::kLongest, Ngrams::kLongest, to.data() + slot * Ngrams::kLongest);
  }
  void reset(int64_t slot) {
    encoder.reset(slot);
    decoder.reset(slot);
    std::fill_n(ngrams.recent.data() + slot * Ngrams::kLongest, Ngrams::kLongest, -1);
  }
  // Back to where the slot was saved, then through the first `count` bytes of the last call.
  void keep(int64_t row, int64_t length, int64_t slot, int64_t count) {
    if (count == length) return;
    copy(slot, true);
    encoder.replay(row, length, slot, count);
    decoder.replay(row, length, slot, count);
    for (int64_t t = 0; t < count; t++) ngrams.push(slot, traced[row * length + t]);
  }
};

}  // namespace
}  // namespace mbs

using mbs::Model;

MBS_API void* mbs_new(const int64_t* whole, const double* real) {
  mbs::Reader in{whole, real};
  return new Model(in);
}
MBS_API void mbs_free(void* model) { delete static_cast<Model*>(model); }
MBS_API void mbs_encode(void* model, int64_t rows, int64_t length, const int64_t* slots, const int64_t* ids, float* r,
                        int64_t threads) {
  static_cast<Model*>(model)->encode(rows, length, slots, ids, r, int(threads));
}
MBS_API void mbs_decode(void* model, int64_t rows, int64_t length, const int64_t* slots, const int64_t* ids,
                        const float* s, const float* r, float* logits, int64_t threads) {
  static_cast<Model*>(model)->decode(rows, length, slots, ids, s, r, logits, int(threads));
}
MBS_API void mbs_backbone(void* model, int64_t count, const int64_t* slots, const int64_t* places, const float* x,
                          float* out, int64_t threads) {
  static_cast<Model*>(model)->backbone.run(count, slots, places, x, out, int(threads));
}
MBS_API void mbs_reset(void* model, int64_t rows, const int64_t* slots) {
  for (int64_t row = 0; row < rows; row++) static_cast<Model*>(model)->reset(slots[row]);
}
// `back`: 0 remembers where the slots stand, 1 takes them back there.
MBS_API void mbs_copy(void* model, int64_t rows, const int64_t* slots, int64_t back) {
  for (int64_t row = 0; row < rows; row++) static_cast<Model*>(model)->copy(slots[row], back != 0);
}
MBS_API void mbs_keep(void* model, int64_t rows, int64_t length, const int64_t* slots, const int64_t* counts) {
  for (int64_t row = 0; row < rows; row++) static_cast<Model*>(model)->keep(row, length, slots[row], counts[row]);
}
