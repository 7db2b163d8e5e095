// A model as inference/engine_cpu.py describes it, and the norms and gated layers that are read from it.
#pragma once
#include "vector.h"

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

}  // namespace
}  // namespace mbs
