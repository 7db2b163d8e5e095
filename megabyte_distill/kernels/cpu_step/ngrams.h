// Rows of hashed n-grams (kernels/ngrams.py).
#pragma once
#include <algorithm>
#include <vector>

#include "description.h"

namespace mbs {
namespace {

// Their tables lie one behind the other.
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

}  // namespace
}  // namespace mbs
