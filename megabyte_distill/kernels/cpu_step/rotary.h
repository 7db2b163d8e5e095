// Rotary positions: of the backbone's items and of bytes (model/rotary.py).
#pragma once
#include <cmath>
#include <cstdint>

namespace mbs {
namespace {

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

}  // namespace
}  // namespace mbs
