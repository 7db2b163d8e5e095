// The steps of an engine on a CPU in fp32, each a single call: encoder, decoder, backbone, over some of R slots.
//
// What they compute is model/'s: byte_encoder.py, byte_decoder.py, conv_mixer.py, mamba2.py, local_attention.py and the
// teacher's layers; the weights are the modules' own memory. inference/engine_cpu.py writes the description that `Reader`
// reads, in the order in which the constructors below take it.
#include <omp.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "attention.h"
#include "vector.h"

#define MBS_API extern "C" __attribute__((visibility("default")))

namespace mbs {
namespace {

// A description: whole numbers (pointers among them) and real ones.
struct Reader {
  const int64_t* whole;
  const double* real;
  int64_t number() { return *whole++; }
  float fraction() { return float(*real++); }
  const float* pointer() { return reinterpret_cast<const float*>(*whole++); }
  Dense dense() {
    Dense d;
    d.weight = pointer();
    d.bias = pointer();
    d.in = number();
    d.out = number();
    return d;
  }
};

struct Norm {
  const float* weight;
  float eps;
  int64_t width;
  explicit Norm(Reader& in) : weight(in.pointer()), eps(in.fraction()), width(in.number()) {}
  void operator()(int64_t count, const float* x, float* y) const { rms_norms(count, x, weight, eps, width, y); }
};

// out(value(x) * silu(gate(x)))
struct Gated {
  Dense value, gate, out;
  explicit Gated(Reader& in) : value(in.dense()), gate(in.dense()), out(in.dense()) {}
  void operator()(int64_t count, const float* x, float* hidden, float* y, bool adds) const {
    dense(value, count, x, value.in, hidden, 2 * value.out);
    dense(gate, count, x, value.in, hidden + value.out, 2 * value.out);
#pragma omp barrier
    swiglu(count, hidden, value.out);
    dense(out, count, hidden, 2 * value.out, y, out.out, adds);
#pragma omp barrier
  }
  int64_t hidden_size() const { return 2 * value.out; }
};

// The cosines [half] and sines [half] of a position, times `size`.
inline void turn(int64_t place, int64_t half, const float* frequencies, float size, float* by) {
  for (int64_t i = 0; i < half; i++) {
    const float angle = float(place) * frequencies[i];
    by[i] = std::cos(angle) * size;
    by[half + i] = std::sin(angle) * size;
  }
}
// The same of a byte: a document has more of them than fp32 has digits for their angles.
inline void turn_byte(int64_t place, int64_t half, const float* frequencies, float* by) {
  constexpr double kWhole = 6.283185307179586;
  for (int64_t i = 0; i < half; i++) {
    const float angle = float(std::fmod(double(place) * double(frequencies[i]), kWhole));
    by[i] = std::cos(angle);
    by[half + i] = std::sin(angle);
  }
}
inline void rotate(float* head, int64_t half, const float* by) {
  for (int64_t i = 0; i < half; i++) {
    const float first = head[i], second = head[half + i];
    head[i] = first * by[i] - second * by[half + i];
    head[half + i] = second * by[i] + first * by[half + i];
  }
}

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

// Blocks one after the other, and how many bytes each slot has read.
struct Stack {
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<int64_t> read, saved_read;
  Stack(Reader& in, int64_t slots) : read(slots), saved_read(slots) {
    for (int64_t left = in.number(); left > 0; left--) {
      switch (in.number()) {
        case 0: blocks.push_back(std::make_unique<ConvBlock>(in, slots)); break;
        case 1: blocks.push_back(std::make_unique<MambaBlock>(in, slots)); break;
        default: blocks.push_back(std::make_unique<AttentionBlock>(in, slots));
      }
    }
  }
  int64_t scratch() const {
    int64_t most = 0;
    for (auto& block : blocks) most = std::max(most, block->scratch());
    return most;
  }
  void prepare(const Bytes& bytes) {
    for (auto& block : blocks) block->prepare(bytes);
  }
  void run(const Bytes& bytes, float* x, float* normed, float* more) {
    for (auto& block : blocks) block->run(bytes, x, normed, more);
  }
  void reset(int64_t slot) {
    read[slot] = 0;
    for (auto& block : blocks) std::fill_n(block->of(slot), block->state_size, 0.0f);
  }
  void copy(int64_t slot, bool back) {
    if (back) read[slot] = saved_read[slot];
    else saved_read[slot] = read[slot];
    for (auto& block : blocks) {
      room(block->saved, int64_t(block->state.size()));
      float *own = block->of(slot), *kept = block->saved.data() + slot * block->state_size;
      std::copy_n(back ? kept : own, block->state_size, back ? own : kept);
    }
  }
  void replay(int64_t row, int64_t length, int64_t slot, int64_t count) {
    for (auto& block : blocks) block->replay(row, length, slot, read[slot], count);
    read[slot] += count;
  }
};

// Rows of hashed n-grams (kernels/ngrams.py): their tables one behind the other.
struct Ngrams {
  static constexpr int64_t kLongest = 8;
  const float* table;
  int64_t rows;
  std::vector<int64_t> sizes;
  std::vector<int64_t> recent, saved;  // [slots][kLongest], the last byte first; −1 before the document
  Ngrams(Reader& in, int64_t slots) : table(in.pointer()), rows(in.number()), sizes(in.number()) {
    for (int64_t& size : sizes) size = in.number();
    recent.assign(slots * kLongest, -1);
    saved = recent;
  }
  void push(int64_t slot, int64_t byte) {
    int64_t* own = recent.data() + slot * kLongest;
    std::copy_backward(own, own + kLongest - 1, own + kLongest);
    own[0] = byte;
  }
  void add(int64_t slot, int64_t width, float* x) const {
    for (size_t table_index = 0; table_index < sizes.size(); table_index++) {
      uint64_t hash = 0, power = 1;
      for (int64_t distance = 0; distance < sizes[table_index]; distance++) {
        hash += uint64_t(recent[slot * kLongest + distance] + 1) * power;
        power *= 1000003u;
      }
      const int64_t index = int64_t((hash * 0x9E3779B97F4A7C15ull) >> 33) % rows + int64_t(table_index) * rows;
      for (int64_t i = 0; i < width; i++) x[i] += table[index * width + i];
    }
  }
};

// One layer of the backbone. Queries, keys and values of an item lie in one row; where, `query`, `key`, `value` say.
struct Layer {
  std::vector<Dense> projections;
  std::vector<int64_t> offsets;
  std::vector<int64_t> query, key, value;  // where each head begins, by head and by group
  Dense out;
  std::vector<Dense> up;  // [gate | up] in one matrix or two
  Dense down;
  // in front of the branches and on what they add; null where there is none
  const float *before_attention, *behind_attention, *before_mlp, *behind_mlp;
  const float *query_norm, *key_norm;
  int64_t window;  // 0 for none
  static std::vector<Dense> several(Reader& in) {
    std::vector<Dense> found(in.number());
    for (Dense& own : found) own = in.dense();
    return found;
  }
  static std::vector<int64_t> list(Reader& in) {
    std::vector<int64_t> found(in.number());
    for (int64_t& own : found) own = in.number();
    return found;
  }
  explicit Layer(Reader& in)
      : projections(several(in)), query(list(in)), key(list(in)), value(list(in)), out(in.dense()), up(several(in)),
        down(in.dense()), before_attention(in.pointer()), behind_attention(in.pointer()), before_mlp(in.pointer()),
        behind_mlp(in.pointer()), query_norm(in.pointer()), key_norm(in.pointer()), window(in.number()) {
    int64_t at = 0;
    for (const Dense& own : projections) {
      offsets.push_back(at);
      at += own.out;
    }
  }
  // By slot, for `capacity` positions: keys group by group, and their values.
  std::vector<Numbers> keys, values;
  std::vector<int64_t> capacity;
};

struct Backbone {
  int64_t width, head_dim, hidden, columns;
  int64_t qk_norm;  // 0 none, 1 each head, 2 all heads together
  int64_t activation;  // 0 silu, 1 gelu
  float eps, magnitude, scale;
  const float *frequencies, *sliding;
  std::vector<std::unique_ptr<Layer>> layers;
  Norm last;
  Numbers x, normed, qkv, attended, inner, branch, turns;
  Backbone(Reader& in, int64_t slots)
      : width(in.number()), head_dim(in.number()), hidden(in.number()), columns(in.number()),
        qk_norm(in.number()), activation(in.number()), eps(in.fraction()), magnitude(in.fraction()),
        scale(in.fraction()), frequencies(in.pointer()), sliding(in.pointer()), layers(in.number()), last(with_layers(in, slots)) {}
  Reader& with_layers(Reader& in, int64_t slots) {
    for (auto& layer : layers) {
      layer = std::make_unique<Layer>(in);
      layer->keys.resize(slots);
      layer->values.resize(slots);
      layer->capacity.assign(slots, 0);
    }
    return in;
  }
  void grow(Layer& layer, int64_t slot, int64_t needed) {
    const int64_t old = layer.capacity[slot], groups = int64_t(layer.key.size());
    if (needed <= old) return;
    const int64_t larger = std::max({int64_t(64), 2 * old, padded(needed)});
    spread(layer.keys[slot], groups, keys_size(old, head_dim), keys_size(larger, head_dim));
    spread(layer.values[slot], groups, values_size(old, head_dim), values_size(larger, head_dim));
    layer.capacity[slot] = larger;
  }
  static void spread(Numbers& stored, int64_t groups, int64_t old, int64_t larger) {
    Numbers grown(groups * larger);
    for (int64_t group = 0; group < groups; group++)
      std::copy_n(stored.data() + group * old, old, grown.data() + group * larger);
    stored.swap(grown);
  }
  // Cosines and sines [N][full, sliding][2][head_dim / 2].
  void turn_all(int64_t count, const int64_t* places) {
    for (int64_t n = 0; n < count; n++) {
      turn(places[n], head_dim / 2, frequencies, magnitude, turns.data() + n * 2 * head_dim);
      turn(places[n], head_dim / 2, sliding, 1.0f, turns.data() + (n * 2 + 1) * head_dim);
    }
  }
  void norm_heads(float* row, const std::vector<int64_t>& heads, const float* weight) const {
    if (qk_norm == 1) {
      for (int64_t at : heads) rms_norm(row + at, weight, eps, head_dim, row + at);
      return;
    }
    float squares = 0;
    for (int64_t at : heads) squares += dot(row + at, row + at, head_dim);
    const float scale = 1.0f / std::sqrt(squares / float(heads.size() * head_dim) + eps);
    for (size_t h = 0; h < heads.size(); h++)
      for (int64_t i = 0; i < head_dim; i++) row[heads[h] + i] *= scale * weight[h * head_dim + i];
  }
  void place(Layer& layer, float* row, int64_t n, int64_t slot, int64_t at) {
    if (qk_norm) {
      norm_heads(row, layer.query, layer.query_norm);
      norm_heads(row, layer.key, layer.key_norm);
    }
    const float* by = turns.data() + (n * 2 + (layer.window ? 1 : 0)) * head_dim;
    for (int64_t head : layer.query) rotate(row + head, head_dim / 2, by);
    const int64_t groups = int64_t(layer.key.size()), capacity = layer.capacity[slot];
    for (int64_t group = 0; group < groups; group++) {
      rotate(row + layer.key[group], head_dim / 2, by);
      store_key(row + layer.key[group], at, head_dim, layer.keys[slot].data() + group * keys_size(capacity, head_dim));
      store_value(row + layer.value[group], at, head_dim,
                  layer.values[slot].data() + group * values_size(capacity, head_dim));
    }
  }
  // `heads` of them from `head` on, of one group.
  void attend_heads(const Layer& layer, const float* row, int64_t head, int64_t heads, int64_t slot, int64_t at,
                    float* out) const {
    const int64_t groups = int64_t(layer.key.size()), group = head / (int64_t(layer.query.size()) / groups);
    const int64_t capacity = layer.capacity[slot];
    const Past past{layer.keys[slot].data() + group * keys_size(capacity, head_dim),
                    layer.values[slot].data() + group * values_size(capacity, head_dim),
                    layer.window && at >= layer.window ? at - layer.window + 1 : 0, at + 1, head_dim, scale};
    const float* queries[kHeads];
    for (int64_t i = 0; i < heads; i++) queries[i] = row + layer.query[head + i];
    attend(int(heads), queries, past, out);
  }
  void run(int64_t count, const int64_t* slots, const int64_t* places, const float* in, float* out, int threads) {
    for (auto& layer : layers)
      for (int64_t n = 0; n < count; n++) grow(*layer, slots[n], places[n] + 1);
    const int64_t heads = int64_t(layers[0]->query.size());
    float* stream = room(x, count * width);
    std::copy_n(in, count * width, stream);
    room(normed, count * width);
    room(branch, count * width);
    room(qkv, count * columns);
    room(attended, count * heads * head_dim);
    room(inner, count * 2 * hidden);
    room(turns, count * 2 * head_dim);
    turn_all(count, places);
#pragma omp parallel num_threads(threads)
    {
      for (auto& layer : layers) one(*layer, count, heads, slots, places);
      last(count, stream, out);
    }
  }
  // out = matrix(in), added to the stream; normed first where there is a norm.
  void add(const Dense& matrix, const float* norm, int64_t count, const float* in, int64_t stride) {
    if (!norm) {
      dense(matrix, count, in, stride, x.data(), width, true);
#pragma omp barrier
      return;
    }
    dense(matrix, count, in, stride, branch.data(), width);
#pragma omp barrier
    rms_norms(count, branch.data(), norm, eps, width, normed.data());
#pragma omp for schedule(static)
    for (int64_t i = 0; i < count * width; i++) x[i] += normed[i];
  }
  const float* enter(const float* norm, int64_t count) {
    if (!norm) return x.data();
    rms_norms(count, x.data(), norm, eps, width, normed.data());
    return normed.data();
  }
  void one(Layer& layer, int64_t count, int64_t heads, const int64_t* slots, const int64_t* places) {
    const float* entered = enter(layer.before_attention, count);
    for (size_t i = 0; i < layer.projections.size(); i++)
      dense(layer.projections[i], count, entered, width, qkv.data() + layer.offsets[i], columns);
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t n = 0; n < count; n++) place(layer, qkv.data() + n * columns, n, slots[n], places[n]);
    const int64_t groups = int64_t(layer.key.size()), sharing = heads / groups;
    // a group's heads go together, unless there are threads that would have nothing to do
    const int64_t most = count * groups < omp_get_num_threads() ? 1 : kHeads, parts = (sharing + most - 1) / most;
#pragma omp for collapse(2) schedule(static)
    for (int64_t n = 0; n < count; n++)
      for (int64_t part = 0; part < groups * parts; part++) {
        const int64_t begin = part % parts * sharing / parts, end = (part % parts + 1) * sharing / parts;
        const int64_t head = part / parts * sharing + begin;
        attend_heads(layer, qkv.data() + n * columns, head, end - begin, slots[n], places[n],
                     attended.data() + (n * heads + head) * head_dim);
      }
    add(layer.out, layer.behind_attention, count, attended.data(), heads * head_dim);
    entered = enter(layer.before_mlp, count);
    int64_t at = 0;
    for (const Dense& own : layer.up) {
      dense(own, count, entered, width, inner.data() + at, 2 * hidden);
      at += own.out;
    }
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t n = 0; n < count; n++) {
      float *gate = inner.data() + n * 2 * hidden, *value = gate + hidden;
      const auto activated = [&](auto f) {
        each(hidden, gate, [&](int64_t i, int c) { return f(load(gate + i, c)) * load(value + i, c); });
      };
      activation ? activated([](Vec v) { return gelu(v); }) : activated([](Vec v) { return silu(v); });
    }
    add(layer.down, layer.behind_mlp, count, inner.data(), 2 * hidden);
  }
};

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
