// The teacher's layers over one item a slot: attention to what each slot keeps, and the MLP.
#pragma once
#include <algorithm>
#include <memory>
#include <omp.h>
#include <vector>

#include "attention.h"
#include "description.h"
#include "rotary.h"

namespace mbs {
namespace {

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

}  // namespace
}  // namespace mbs
