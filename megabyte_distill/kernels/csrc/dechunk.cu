// F4: chunk states to bytes, plus a residual; and all gradients, the straight-through confidence's among them.
//
//   s_m = (1 - w_m) s_{m-1} + w_m h_m       w_m = p at the chunk's end, clamped; s starts anew with each segment
//   z_t = read_t + residual_t               read_t = h or s of the last chunk that ended at or before t, by mode
//
// A block holds a run of chunks over the whole width, with the bytes that read them, so sums over the width need no
// atomics. No state passes between blocks: a block first walks back over the scalar decays until their product no longer
// matters (or a segment begins), and warms its state up from there; the backward pass does the same ahead.
#include "kernel.h"

namespace mbk {
namespace {

enum Mode : int64_t { kHard, kCausal, kOfficial };

constexpr float kClamp = 1e-4f;     // as ops.P_CLAMP
constexpr float kForgotten = 1e-9f; // a product of decays below this leaves nothing of a state
constexpr int kPending = 32;        // sums over the width that a block collects between two barriers
constexpr int kMaxRun = 64;         // chunks of a block

// Byte rows a thread loads before it uses the first of them.
template <int PASSES>
constexpr int kRowsInFlight = PASSES == 1 ? 4 : 1;

// The layout of a packed row: M chunks, the last of them perhaps padding, over P bytes.
struct Layout {
  const int64_t* ends;           // [M] last byte of a chunk; P - 1 for padding
  const int64_t* chunk_of_byte;  // [P] -1 before a segment's first end
  const uint8_t* starts;         // [M] first chunk of a segment, or of the padding
  const float* p;                // [P]
  int64_t chunks, bytes;
};

// No byte reads a padding chunk, not even the last one.
__device__ __forceinline__ bool is_real(const Layout& at, int64_t m) {
  return m < at.chunks && __ldg(at.chunk_of_byte + __ldg(at.ends + m)) == m;
}
__device__ __forceinline__ float weight_of(const Layout& at, int64_t m, int64_t mode) {
  if (mode == kCausal && at.starts[m]) return 1.f;
  return min(max(__ldg(at.p + __ldg(at.ends + m)), kClamp), 1.f - kClamp);
}
// What is left of the state of m - 1 in that of m.
__device__ __forceinline__ float decay_of(const Layout& at, int64_t m, int64_t mode) {
  return at.starts[m] || !is_real(at, m) ? 0.f : 1.f - weight_of(at, m, mode);
}

// Lanes hold decays of consecutive chunks in walking order: the first lane up to which their product is forgotten, or 32;
// carry is the product so far.
__device__ __forceinline__ int first_forgotten(float decay, float& carry) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int offset = 1; offset < 32; offset <<= 1) {
    const float before = __shfl_up_sync(kAll, decay, offset);
    if (lane >= offset) decay *= before;
  }
  const unsigned hits = __ballot_sync(kAll, carry * decay < kForgotten);
  carry *= __shfl_sync(kAll, decay, 31);
  return hits ? __ffs(int(hits)) - 1 : 32;
}
// First chunk whose state the state of chunk m needs; every warp alike.
__device__ __forceinline__ int64_t look_back(const Layout& at, int64_t m, int64_t mode) {
  float carry = 1.f;
  for (int64_t base = m;; base -= 32) {
    const int64_t own = base - (threadIdx.x & 31);
    const int lane = first_forgotten(own > 0 ? decay_of(at, own, mode) : 0.f, carry);
    if (lane < 32) return max(int64_t(0), base - lane);
  }
}
// First chunk from m on whose gradient no longer reaches chunk m - 1.
__device__ __forceinline__ int64_t look_ahead(const Layout& at, int64_t m, int64_t mode) {
  float carry = 1.f;
  for (int64_t base = m;; base += 32) {
    const int64_t own = base + (threadIdx.x & 31);
    const int lane = first_forgotten(own < at.chunks ? decay_of(at, own, mode) : 0.f, carry);
    if (lane < 32) return min(at.chunks, base + lane);
  }
}

// The scalars of a block's chunks [first, end), in shared memory.
struct Run {
  int64_t* begins;  // [kMaxRun + 1] first byte of a chunk; bytes [begins[i], begins[i + 1]) read it or nothing
  float* weight;    // [kMaxRun]
  float* decay;     // [kMaxRun]
  int64_t first, end;
  static constexpr size_t kBytes = sizeof(int64_t) * (kMaxRun + 1) + 2 * sizeof(float) * kMaxRun;

  __device__ __forceinline__ Run(unsigned char* memory, const Layout& at, int64_t mode, int run) {
    begins = reinterpret_cast<int64_t*>(memory);
    weight = reinterpret_cast<float*>(begins + kMaxRun + 1);
    decay = weight + kMaxRun;
    first = int64_t(blockIdx.x) * run;
    end = min(first + run, at.chunks);
    for (int64_t i = threadIdx.x; i <= end - first; i += blockDim.x) {
      const int64_t m = first + i;
      begins[i] = is_real(at, m) ? __ldg(at.ends + m) : at.bytes;
      if (m < end && mode != kHard) weight[i] = weight_of(at, m, mode), decay[i] = decay_of(at, m, mode);
    }
    __syncthreads();
  }
};

template <int PASSES>
struct Columns {
  int64_t width;
  __device__ __forceinline__ int at(int pass) const { return (pass * blockDim.x + threadIdx.x) * kVec; }
  __device__ __forceinline__ bool has(int pass) const { return at(pass) < width; }
};
template <int PASSES>
using RowPart = float[PASSES][kVec];

template <class T, int PASSES>
__device__ __forceinline__ void load_row(const T* rows, int64_t row, const Columns<PASSES>& columns, RowPart<PASSES>& to) {
#pragma unroll
  for (int k = 0; k < PASSES; ++k)
    if (columns.has(k)) load(rows + row * columns.width + columns.at(k), to[k]);
}
template <class T, int PASSES>
__device__ __forceinline__ void store_row(T* rows, int64_t row, const Columns<PASSES>& columns,
                                          const RowPart<PASSES>& from) {
#pragma unroll
  for (int k = 0; k < PASSES; ++k)
    if (columns.has(k)) store(rows + row * columns.width + columns.at(k), from[k]);
}
template <int PASSES>
__device__ __forceinline__ void clear(RowPart<PASSES>& row) {
#pragma unroll
  for (int k = 0; k < PASSES; ++k) fill(row[k], 0.f);
}
template <int PASSES>
__device__ __forceinline__ void copy(RowPart<PASSES>& to, const RowPart<PASSES>& from) {
#pragma unroll
  for (int k = 0; k < PASSES; ++k)
#pragma unroll
    for (int i = 0; i < kVec; ++i) to[k][i] = from[k][i];
}
// to = a * to + b * x
template <int PASSES>
__device__ __forceinline__ void blend(RowPart<PASSES>& to, float a, float b, const RowPart<PASSES>& x) {
#pragma unroll
  for (int k = 0; k < PASSES; ++k)
#pragma unroll
    for (int i = 0; i < kVec; ++i) to[k][i] = fmaf(a, to[k][i], b * x[k][i]);
}
template <int PASSES>
__device__ __forceinline__ float dot(const RowPart<PASSES>& x, const RowPart<PASSES>& y) {
  float sum = 0.f;
#pragma unroll
  for (int k = 0; k < PASSES; ++k)
#pragma unroll
    for (int i = 0; i < kVec; ++i) sum = fmaf(x[k][i], y[k][i], sum);
  return sum;
}

// ---- forward ----------------------------------------------------------------------------------------------------

template <class T>
struct ForwardRows {
  const T* h;           // [M, width]
  const T* residual;    // [P, width]
  const T* null_group;  // [width] or null: NaN is read in its place
  T* z;                 // [P, width]
  T* states;            // [M, width] or null
};

// z for bytes [t, end) that read `state`; in causal mode the byte at `raw_at` reads h instead.
template <class T, int PASSES>
__device__ __forceinline__ void read_state(const ForwardRows<T>& rows, const Columns<PASSES>& columns, int64_t t,
                                           int64_t end, const RowPart<PASSES>& state, const RowPart<PASSES>& h,
                                           int64_t raw_at) {
  constexpr int R = kRowsInFlight<PASSES>;
  for (; t < end; t += R) {
    float z[R][PASSES][kVec];
#pragma unroll
    for (int r = 0; r < R; ++r)
      if (t + r < end) load_row<T, PASSES>(rows.residual, t + r, columns, z[r]);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      if (t + r >= end) break;
      blend<PASSES>(z[r], 1.f, 1.f, t + r == raw_at ? h : state);
      store_row<T, PASSES>(rows.z, t + r, columns, z[r]);
    }
  }
}
template <class T, int PASSES>
__device__ __forceinline__ void read_null(const ForwardRows<T>& rows, const Columns<PASSES>& columns, int64_t t,
                                          int64_t end) {
  if (t >= end) return;
  float null[PASSES][kVec];
#pragma unroll
  for (int k = 0; k < PASSES; ++k) fill(null[k], __uint_as_float(0x7fc00000u));
  if (rows.null_group) load_row<T, PASSES>(rows.null_group, 0, columns, null);
  read_state<T, PASSES>(rows, columns, t, end, null, null, -1);
}

template <class T, int PASSES, int64_t MODE>
__global__ void __launch_bounds__(kRowThreads, 1) dechunk_forward(Layout at, ForwardRows<T> rows, int64_t width, int run) {
  const Columns<PASSES> columns{width};
  const Run own(shared_memory<unsigned char>(), at, MODE, run);
  float state[PASSES][kVec], h[PASSES][kVec], next[PASSES][kVec];
  clear<PASSES>(state);
  if (MODE != kHard && own.first < own.end)
    for (int64_t back = look_back(at, own.first, MODE), m = back; m < own.first; ++m) {
      load_row<T, PASSES>(rows.h, m, columns, h);
      blend<PASSES>(state, m == back ? 0.f : decay_of(at, m, MODE), weight_of(at, m, MODE), h);
    }
  if (own.first == 0) read_null<T, PASSES>(rows, columns, 0, own.begins[0]);
  if (own.first < own.end) load_row<T, PASSES>(rows.h, own.first, columns, next);
  for (int64_t m = own.first; m < own.end; ++m) {
    const int i = int(m - own.first);
    const int64_t begin = own.begins[i];
    int64_t end = own.begins[i + 1];
    if (begin >= end) break;  // padding from here on
    copy<PASSES>(h, next);
    if (m + 1 < own.end) load_row<T, PASSES>(rows.h, m + 1, columns, next);
    if (MODE != kHard) {
      blend<PASSES>(state, own.decay[i], own.weight[i], h);
      if (rows.states) store_row<T, PASSES>(rows.states, m, columns, state);
    }
    const int64_t all = end;
    if (MODE == kOfficial)  // behind a segment's last byte, bytes of the next one may stand before its first end
      while (__ldg(at.chunk_of_byte + end - 1) != m) --end;
    read_state<T, PASSES>(rows, columns, begin, end, MODE == kHard ? h : state, h, MODE == kCausal ? begin : -1);
    if (MODE == kOfficial) read_null<T, PASSES>(rows, columns, end, all);
  }
}

// ---- backward ---------------------------------------------------------------------------------------------------

template <class T>
struct BackwardRows {
  const T* dz;          // [P, width]
  const T* h;           // [M, width]
  const T* states;      // [M, width], null in hard mode
  const T* null_group;  // [width] or null
  T* dh;                // [M, width]
  float* d_confidence;  // [P] or null
  float* d_p;           // [P] or null
  float* null_sums;     // [blocks, width] or null
};

// Collects sums over the width and writes them to their places, kPending at a time.
struct Pending {
  float* values;  // [kPending][32 warps]
  float** places; // [kPending]
  int count = 0;
  static constexpr size_t kBytes = kPending * (32 * sizeof(float) + sizeof(float*));

  __device__ __forceinline__ explicit Pending(unsigned char* memory)
      : values(reinterpret_cast<float*>(memory + kPending * sizeof(float*))), places(reinterpret_cast<float**>(memory)) {}
  // Sums of up to four numbers; `n` of them are wanted, in the places from `place` on.
  __device__ __forceinline__ void add(const float (&x)[4], int n, float* place) {
    if (count + n > kPending) flush();
    const float sum = warp_sums_of_four(x);
    const int lane = threadIdx.x & 31, g = lane >> 3;
    if ((lane & 7) == 0 && g < n) {
      values[(count + g) * 32 + (threadIdx.x >> 5)] = sum;
      if (threadIdx.x < 32) places[count + g] = place + g;
    }
    count += n;
  }
  __device__ __forceinline__ void flush() {
    __syncthreads();
    const int warps = int(blockDim.x) >> 5;
    for (int j = threadIdx.x; j < count; j += blockDim.x) {
      float sum = 0.f;
      for (int w = 0; w < warps; ++w) sum += values[j * 32 + w];
      *places[j] = sum;
    }
    __syncthreads();
    count = 0;
  }
};

// Adds dz of the bytes that read the state of m to `to`; those bytes are [begin, end), in causal mode all but the first.
template <class T, int PASSES, int64_t MODE>
__device__ __forceinline__ void gather_ahead(const Layout& at, const BackwardRows<T>& rows, const Columns<PASSES>& columns,
                                             int64_t m, RowPart<PASSES>& to) {
  const int64_t begin = __ldg(at.ends + m);
  const int64_t end = is_real(at, m + 1) ? __ldg(at.ends + m + 1) : at.bytes;
  for (int64_t t = MODE == kCausal ? begin + 1 : begin; t < end; ++t) {
    if (MODE == kOfficial && __ldg(at.chunk_of_byte + t) != m) break;
    float dz[PASSES][kVec];
    clear<PASSES>(dz);
    load_row<T, PASSES>(rows.dz, t, columns, dz);
    blend<PASSES>(to, 1.f, 1.f, dz);
  }
}

// The bytes [begin, end) of one chunk: adds their dz to `to`, in causal mode the first one's to `raw`; their confidences'
// gradients are dz · what they read.
template <class T, int PASSES, int64_t MODE, bool SCALARS>
__device__ __forceinline__ void gather(const BackwardRows<T>& rows, const Columns<PASSES>& columns, int64_t begin,
                                       int64_t end, const RowPart<PASSES>& read, const RowPart<PASSES>& h,
                                       RowPart<PASSES>& to, RowPart<PASSES>& raw, Pending& sums, bool ends_chunk) {
  constexpr int R = kRowsInFlight<PASSES>;
  for (int64_t t = begin; t < end; t += R) {
    float dz[R][PASSES][kVec], products[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int r = 0; r < R; ++r) {
      clear<PASSES>(dz[r]);
      if (t + r < end) load_row<T, PASSES>(rows.dz, t + r, columns, dz[r]);
    }
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const bool is_raw = MODE == kCausal && r == 0 && t == begin && ends_chunk;
      if (is_raw) blend<PASSES>(raw, 1.f, 1.f, dz[r]);
      else blend<PASSES>(to, 1.f, 1.f, dz[r]);
      if (SCALARS) products[r] = is_raw ? dot<PASSES>(dz[r], h) : dot<PASSES>(dz[r], read);
    }
    if (SCALARS) {
      const int n = int(min(int64_t(R), end - t));
      if (rows.d_confidence) sums.add(products, n, rows.d_confidence + t);
      // p counts at the ends only; the end's own gradient comes with its chunk
      if (rows.d_p && int(threadIdx.x) < n && !(ends_chunk && t + int(threadIdx.x) == begin)) rows.d_p[t + threadIdx.x] = 0.f;
    }
  }
}

template <class T, int PASSES, int64_t MODE, bool SCALARS>
__device__ __forceinline__ void gather_null(const BackwardRows<T>& rows, const Columns<PASSES>& columns, int64_t begin,
                                            int64_t end, RowPart<PASSES>& to, Pending& sums) {
  float null[PASSES][kVec];
  clear<PASSES>(null);
  if (SCALARS && rows.null_group && begin < end) load_row<T, PASSES>(rows.null_group, 0, columns, null);
  gather<T, PASSES, MODE, SCALARS>(rows, columns, begin, end, null, null, to, to, sums, false);
}

template <class T, int PASSES, int64_t MODE, bool SCALARS>
__global__ void __launch_bounds__(kRowThreads, 1) dechunk_backward(Layout at, BackwardRows<T> rows, int64_t width, int run) {
  constexpr bool kStates = MODE != kHard;
  const Columns<PASSES> columns{width};
  unsigned char* memory = shared_memory<unsigned char>();
  Pending sums(memory);
  const Run own(memory + Pending::kBytes, at, MODE, run);
  float ds[PASSES][kVec], h[PASSES][kVec], state[PASSES][kVec], before[PASSES][kVec];
  float aside[PASSES][kVec];  // causal: dz of the byte that read h; official: of all that read null_group
  clear<PASSES>(ds), clear<PASSES>(h), clear<PASSES>(state), clear<PASSES>(before), clear<PASSES>(aside);
  float next_decay = 0.f;
  if (kStates && own.end < at.chunks)
    for (int64_t m = look_ahead(at, own.end, MODE) - 1; m >= own.end; --m) {
      blend<PASSES>(ds, next_decay, 0.f, ds);
      gather_ahead<T, PASSES, MODE>(at, rows, columns, m, ds);
      next_decay = decay_of(at, m, MODE);
    }
  if (kStates && SCALARS && own.first < own.end) load_row<T, PASSES>(rows.states, own.end - 1, columns, state);
  for (int64_t m = own.end - 1; m >= own.first; --m) {
    const int i = int(m - own.first);
    const int64_t begin = own.begins[i], all = own.begins[i + 1];
    int64_t end = all;
    if (SCALARS) load_row<T, PASSES>(rows.h, m, columns, h);
    if (kStates && SCALARS && m > 0) load_row<T, PASSES>(rows.states, m - 1, columns, before);
    blend<PASSES>(ds, kStates ? next_decay : 0.f, 0.f, ds);
    if (MODE == kCausal) clear<PASSES>(aside);
    if (MODE == kOfficial && begin < all) {
      while (__ldg(at.chunk_of_byte + end - 1) != m) --end;
      gather_null<T, PASSES, MODE, SCALARS>(rows, columns, end, all, aside, sums);
    }
    gather<T, PASSES, MODE, SCALARS>(rows, columns, begin, end, kStates ? state : h, h, ds, aside, sums, true);
    const bool padding = begin >= all;
    float dh[PASSES][kVec];
    clear<PASSES>(dh);
    if (!padding) blend<PASSES>(dh, 0.f, kStates ? own.weight[i] : 1.f, ds);
    if (MODE == kCausal) blend<PASSES>(dh, 1.f, 1.f, aside);
    store_row<T, PASSES>(rows.dh, m, columns, dh);
    if (SCALARS && rows.d_p && !padding) {
      const float p = __ldg(at.p + begin);
      const bool counts = kStates && p >= kClamp && p <= 1.f - kClamp && !(MODE == kCausal && at.starts[m]);
      if (!at.starts[m]) blend<PASSES>(h, 1.f, -1.f, before);
      const float product[4] = {counts ? dot<PASSES>(ds, h) : 0.f, 0.f, 0.f, 0.f};
      sums.add(product, 1, rows.d_p + begin);
    }
    next_decay = kStates && !padding ? own.decay[i] : 0.f;
    copy<PASSES>(state, before);
  }
  if (MODE == kOfficial) {
    if (own.first == 0) gather_null<T, PASSES, MODE, SCALARS>(rows, columns, 0, own.begins[0], aside, sums);
    if (rows.null_sums) store_row<float, PASSES>(rows.null_sums, blockIdx.x, columns, aside);
  }
  if (SCALARS) sums.flush();
}

// f(integral_constant<int64_t, MODE>) for a mode's code.
template <class F>
int for_mode(int64_t mode, F f) {
  if (mode == kHard) return f(std::integral_constant<int64_t, kHard>{});
  if (mode == kCausal) return f(std::integral_constant<int64_t, kCausal>{});
  if (mode == kOfficial) return f(std::integral_constant<int64_t, kOfficial>{});
  return fail(kBadArgument, "the mode code is neither 0 (hard) nor 1 (causal) nor 2 (official)");
}
int64_t blocks_of(int64_t chunks, int64_t run) { return max(int64_t(1), ceil_div(chunks, run)); }

}  // namespace
}  // namespace mbk

// h [chunks, width], p [bytes] fp32, residual [bytes, width], null_group [width] or null; the layout as in struct Layout.
// Out: z [bytes, width]; states [chunks, width] or null. run: chunks of a block, at most 64.
MBK_API int mbk_dechunk_forward(const void* h, const float* p, const void* residual, const void* null_group,
                                const int64_t* ends, const int64_t* chunk_of_byte, const uint8_t* starts, void* z,
                                void* states, int64_t chunks, int64_t bytes, int64_t width, int64_t run, int64_t mode,
                                int64_t dtype, void* stream) {
  using namespace mbk;
  if (run < 1 || run > kMaxRun) return fail(kBadArgument, "a block takes 1 to 64 chunks");
  if (bytes == 0) return 0;
  return for_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    return for_width(width, [&](auto passes, int threads) {
      return for_mode(mode, [&](auto which) {
        const Layout at{ends, chunk_of_byte, starts, p, chunks, bytes};
        const ForwardRows<T> rows{static_cast<const T*>(h), static_cast<const T*>(residual),
                                  static_cast<const T*>(null_group), static_cast<T*>(z), static_cast<T*>(states)};
        return launch(dechunk_forward<T, decltype(passes)::value, decltype(which)::value>,
                      dim3(unsigned(blocks_of(chunks, run))), dim3(threads), Run::kBytes, stream, at, rows, width, int(run));
      });
    });
  });
}

// dz [bytes, width]. Out: dh [chunks, width]; d_confidence, d_p [bytes] fp32 and d_null [width], null where not wanted.
// states: of the forward pass, where a scalar gradient is wanted outside hard mode. null_sums: fp32 scratch
// [ceil(chunks / run), width] where d_null is wanted.
MBK_API int mbk_dechunk_backward(const void* dz, const void* h, const void* states, const float* p, const void* null_group,
                                 const int64_t* ends, const int64_t* chunk_of_byte, const uint8_t* starts, void* dh,
                                 float* d_confidence, float* d_p, void* d_null, float* null_sums, int64_t chunks,
                                 int64_t bytes, int64_t width, int64_t run, int64_t mode, int64_t dtype, void* stream) {
  using namespace mbk;
  if (run < 1 || run > kMaxRun) return fail(kBadArgument, "a block takes 1 to 64 chunks");
  return for_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    const int code = for_width(width, [&](auto passes, int threads) {
      return for_mode(mode, [&](auto which) {
        constexpr int P = decltype(passes)::value;
        constexpr int64_t kMode = decltype(which)::value;
        const Layout at{ends, chunk_of_byte, starts, p, chunks, bytes};
        const BackwardRows<T> rows{static_cast<const T*>(dz), static_cast<const T*>(h), static_cast<const T*>(states),
                                   static_cast<const T*>(null_group), static_cast<T*>(dh), d_confidence, d_p, null_sums};
        const auto kernel = d_confidence || d_p ? dechunk_backward<T, P, kMode, true> : dechunk_backward<T, P, kMode, false>;
        return launch(kernel, dim3(unsigned(blocks_of(chunks, run))), dim3(threads), Run::kBytes + Pending::kBytes,
                      stream, at, rows, width, int(run));
      });
    });
    if (code || !d_null) return code;
    return sum_rows(null_sums, static_cast<T*>(d_null), blocks_of(chunks, run), width, stream);
  });
}
