// Attention of single positions to keys and values that are kept, in fp32 on a CPU: how they are laid out and read.
#pragma once
#include <algorithm>

#include "vector.h"

namespace mbs {

// What one group of heads remembers, of positions `first` to `end` − 1: keys in blocks of kLanes positions,
// [width][kLanes] each, so that lanes are positions and no sum goes across them; values in rows of padded(width).
// Products with a query are multiplied by `scale`.
struct Past {
  const float *keys, *values;
  int64_t first, end, width;
  float scale;
};
inline int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }
// Numbers that keys and values of so many positions, a multiple of kLanes, take.
inline int64_t keys_size(int64_t positions, int64_t width) { return positions * width; }
inline int64_t values_size(int64_t positions, int64_t width) { return positions * padded(width); }
inline void store_key(const float* key, int64_t at, int64_t width, float* keys) {
  float* block = keys + at / kLanes * kLanes * width + at % kLanes;
  for (int64_t d = 0; d < width; d++) block[d * kLanes] = key[d];
}
inline void store_value(const float* value, int64_t at, int64_t width, float* values) {
  std::copy_n(value, width, values + at * padded(width));
}

// Scores to weights that are not yet divided by their sum, which is returned; those outside [first, end) become 0.
inline float soften(float* scores, int64_t first, int64_t end, int64_t size) {
  std::fill(scores, scores + first, -INFINITY);
  std::fill(scores + end, scores + size, -INFINITY);
  Vec most = load(scores);
  for (int64_t i = kLanes; i < size; i += kLanes) {
    const Vec own = load(scores + i);
    most = own > most ? own : most;
  }
  float highest = most[0];
  for (int lane = 1; lane < kLanes; lane++) highest = std::max(highest, most[lane]);
  for (int64_t i = 0; i < size; i += kLanes) store(scores + i, exp(load(scores + i) - highest));
  std::fill(scores, scores + first, 0.0f);
  std::fill(scores + end, scores + size, 0.0f);
  Vec sum{};
  for (int64_t i = 0; i < size; i += kLanes) sum += load(scores + i);
  return total(sum);
}

// R heads of one position, which share keys and values: each number of the past is read once for all of them.
template <int R>
inline void attend(const float* const* queries, const Past& past, float* out) {
  static thread_local Numbers scores;
  const int64_t begin = past.first / kLanes * kLanes, size = padded(past.end) - begin, width = past.width;
  float *own = room(scores, R * size), sum[R];
  for (int64_t block = 0; block < size; block += kLanes) {
    const float* keys = past.keys + (begin + block) * width;
    Vec products[R] = {};
    for (int64_t d = 0; d < width; d++) {
      const Vec key = load(keys + d * kLanes);
      for (int r = 0; r < R; r++) products[r] += key * queries[r][d];
    }
    for (int r = 0; r < R; r++) store(own + r * size + block, products[r] * past.scale);
  }
  for (int r = 0; r < R; r++) sum[r] = soften(own + r * size, past.first - begin, past.end - begin, size);
  constexpr int kParts = 2;  // of a value, in vectors: what they add up to stays in registers
  for (int64_t d = 0; d < width; d += kParts * kLanes) {
    const int parts = d + kLanes < width ? kParts : 1;
    Vec found[R][kParts] = {};
    const float* values = past.values + begin * padded(width) + d;
    for (int64_t j = past.first - begin; j < past.end - begin; j++)
      for (int part = 0; part < parts; part++) {
        const Vec value = load(values + j * padded(width) + part * kLanes);
        for (int r = 0; r < R; r++) found[r][part] += value * own[r * size + j];
      }
    for (int r = 0; r < R; r++)
      for (int part = 0; part < parts; part++) {
        const Vec mean = found[r][part] / sum[r];
        const int64_t at = d + part * kLanes;
        std::memcpy(out + r * width + at, &mean, sizeof(float) * std::min<int64_t>(kLanes, width - at));
      }
  }
}
constexpr int64_t kHeads = 4;  // at once, at most
inline void attend(int heads, const float* const* queries, const Past& past, float* out) {
  static_assert(kHeads == 4, "the cases are 1 to kHeads");
  switch (heads) {
    case 1: return attend<1>(queries, past, out);
    case 2: return attend<2>(queries, past, out);
    case 3: return attend<3>(queries, past, out);
    default: return attend<kHeads>(queries, past, out);
  }
}

}  // namespace mbs
