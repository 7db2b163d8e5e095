// F4: chunk states to bytes, plus a residual; and all gradients, the straight-through confidence's among them.
//
//   s_m = (1 - w_m) s_{m-1} + w_m h_m       w_m = p at the chunk's end, clamped; s starts anew with each segment
//   z_t = read_t + residual_t               read_t = h or s of the last chunk that ended at or before t, by mode
//
// A block holds the chunks that end in its span of the bytes, with the bytes that read them, over the whole width or, where
// that is large, a tile of it; sums over the width need no atomics. No state passes between blocks: a block begins with
// the sum of the chunks in front, each times the product of the decays in between, as far back as that product matters (or
// a segment begins); the backward pass does the same ahead.
// Then it walks its bytes, a few rows at a time while the next few are on their way; chunks change in between.
#include "kernel.h"

namespace mbk {
namespace {

enum Mode : int64_t { kHard, kCausal, kOfficial };

constexpr float kClamp = 1e-4f;     // as ops.P_CLAMP
constexpr int kPending = 32;        // bytes whose sums over the width a block collects between two barriers
constexpr int kMaxSpan = 512;       // bytes of a block, and so chunks that end in it
constexpr int kThreads = 256;       // of a block at most, kVec columns each

// A product of decays below this leaves nothing of a state: far less than a rounding of the dtype.
template <class T>
constexpr float kForgotten = sizeof(T) == 2 ? 1e-5f : 1e-8f;

// Byte rows a thread handles at once: 64 bytes, and as many on their way.
template <class T>
constexpr int kGroup = 64 / (kVec * int(sizeof(T)));

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
// The first byte that reads chunk m; behind all bytes where m is padding.
__device__ __forceinline__ int64_t begin_of(const Layout& at, int64_t m) {
  return is_real(at, m) ? __ldg(at.ends + m) : at.bytes;
}
__device__ __forceinline__ float weight_of(const Layout& at, int64_t m, int64_t mode) {
  if (mode == kCausal && at.starts[m]) return 1.f;
  return min(max(__ldg(at.p + __ldg(at.ends + m)), kClamp), 1.f - kClamp);
}
// What is left of the state of m - 1 in that of m.
__device__ __forceinline__ float decay_of(const Layout& at, int64_t m, int64_t mode) {
  return at.starts[m] || !is_real(at, m) ? 0.f : 1.f - weight_of(at, m, mode);
}

// Factors of consecutive chunks in walking order, one a lane: their product up to and with the own lane.
__device__ __forceinline__ float product_so_far(float factor) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int offset = 1; offset < 32; offset <<= 1) {
    const float before = __shfl_up_sync(kAll, factor, offset);
    if (lane >= offset) factor *= before;
  }
  return factor;
}
// The first lane for which something holds, or 32.
__device__ __forceinline__ int first_lane(bool holds) {
  const unsigned hits = __ballot_sync(kAll, holds);
  return hits ? __ffs(int(hits)) - 1 : 32;
}

// Official mode: the first byte from ``begin``, where chunk m ends, up to ``end`` that no longer reads m, because its
// segment has no chunk yet.
__device__ __forceinline__ int64_t stop_of(const Layout& at, int64_t m, int64_t begin, int64_t end) {
  if (begin >= end || __ldg(at.chunk_of_byte + end - 1) == m) return end;
  while (begin + 1 < end) {
    const int64_t middle = (begin + end) / 2;
    (__ldg(at.chunk_of_byte + middle) == m ? begin : end) = middle;
  }
  return end;
}

// How many chunks end before ``byte``. Every warp alike.
__device__ __forceinline__ int64_t chunks_before(const Layout& at, int64_t byte) {
  if (byte == 0) return 0;
  const int64_t last = __ldg(at.chunk_of_byte + byte - 1);
  if (last >= 0) return last + 1;
  int64_t low = 0, high = at.chunks;  // the byte's segment has no chunk yet: 32 probes at a time
  while (low < high) {
    const int64_t step = ceil_div<int64_t>(high - low, 32), probe = low + ((threadIdx.x & 31) + 1) * step - 1;
    const int64_t hits = __popc(__ballot_sync(kAll, probe < high && is_real(at, probe) && __ldg(at.ends + probe) < byte));
    high = min(high, low + (hits + 1) * step - 1);
    low += hits * step;
  }
  return low;
}

// The scalars of a block's chunks [first, end), none of them padding, in shared memory. Where a chunk begins is read there
// when it is asked for: ptxas 13.0 makes begins[i - 2] of a copy that is kept in a register while i counts down.
struct Run {
  int* begins;    // [span + 1] first byte of a chunk; bytes [begins[i], begins[i + 1]) read it or nothing
  int* stops;     // [span] official: bytes [stops[i], begins[i + 1]) read nothing
  float* weight;  // [span]
  float* decay;   // [span]
  int64_t first, end;
  static constexpr size_t bytes_of(int64_t span) { return sizeof(int) * (2 * span + 1) + 2 * sizeof(float) * span; }

  __device__ __forceinline__ Run(unsigned char* memory, const Layout& at, int64_t mode, int span) {
    begins = reinterpret_cast<int*>(memory);
    stops = begins + span + 1;
    weight = reinterpret_cast<float*>(stops + span);
    decay = weight + span;
    const int64_t from = int64_t(blockIdx.x) * span;
    first = chunks_before(at, from), end = chunks_before(at, min(from + span, at.bytes));
    for (int64_t i = threadIdx.x; i <= end - first; i += blockDim.x) {
      const int64_t m = first + i, begin = begin_of(at, m);
      begins[i] = int(begin);
      if (m < end && mode == kOfficial) stops[i] = int(stop_of(at, m, begin, begin_of(at, m + 1)));
      if (m < end && mode != kHard) weight[i] = weight_of(at, m, mode), decay[i] = decay_of(at, m, mode);
    }
    __syncthreads();
  }
};

// This thread's columns of a row: the block has those of its tile of the width, the thread kVec of them.
template <class T>
struct Row {
  Packet<T> packet;
  static __device__ __forceinline__ int64_t column() {
    return (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * kVec;
  }
  // Leaves alone what lies behind the width.
  __device__ __forceinline__ void load(const T* rows, int64_t row, int64_t width) {
    if (column() < width) packet.load(rows + row * width + column());
  }
};
using Numbers = float[kVec];

template <class T>
__device__ __forceinline__ void store_row(T* rows, int64_t row, int64_t width, const Numbers& from) {
  if (Row<T>::column() < width) store(rows + row * width + Row<T>::column(), from);
}
// to = a * to + b * row
template <class T>
__device__ __forceinline__ void blend(Numbers& to, float a, float b, const Row<T>& row) {
  float x[kVec];
  row.packet.unpack(x);
#pragma unroll
  for (int i = 0; i < kVec; ++i) to[i] = fmaf(a, to[i], b * x[i]);
}
__device__ __forceinline__ void add(Numbers& to, const Numbers& x) {
#pragma unroll
  for (int i = 0; i < kVec; ++i) to[i] += x[i];
}
__device__ __forceinline__ void scale(Numbers& to, float by) {
#pragma unroll
  for (int i = 0; i < kVec; ++i) to[i] *= by;
}
// Sum of x * row over this thread's columns; what lies behind the width does not count.
template <class T>
__device__ __forceinline__ float dot(const Numbers& x, const Row<T>& row, int64_t width) {
  float y[kVec], sum = 0.f;
  row.packet.unpack(y);
#pragma unroll
  for (int i = 0; i < kVec; ++i) sum = fmaf(x[i], y[i], sum);
  return Row<T>::column() < width ? sum : 0.f;
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

// state += row * factor over `count` rows, the factor of row i in lane i; row(i) says which it is. Every warp alike.
template <class T, class Which>
__device__ __forceinline__ void add_rows(Numbers& state, const T* rows, int64_t width, float factor, int count, Which row) {
  constexpr int R = 2 * kGroup<T>;
  for (int i = 0; i < count; i += R) {
    Row<T> x[R];
    float by[R];
#pragma unroll
    for (int r = 0; r < R; ++r) {
      by[r] = __shfl_sync(kAll, factor, min(i + r, 31));
      if (i + r < count && by[r] != 0.f) x[r].load(rows, row(i + r), width);
    }
#pragma unroll
    for (int r = 0; r < R; ++r)
      if (i + r < count && by[r] != 0.f) blend<T>(state, 1.f, by[r], x[r]);
  }
}

// The state in front of chunk `first`: the chunks before it, the nearest first, until too little is left of them in `first`.
template <class T, int64_t MODE>
__device__ __forceinline__ void warm_up(const Layout& at, const T* h, int64_t first, int64_t width, Numbers& state) {
  float kept = 1.f, left = first > 0 ? decay_of(at, first, MODE) : 0.f;  // of chunk base + 1's state; of base's in `first`
  for (int64_t base = first - 1; left >= kForgotten<T>; base -= 32) {
    const int64_t m = base - (threadIdx.x & 31);
    const float product = product_so_far(m > 0 ? decay_of(at, m, MODE) : 0.f);
    const float before = __shfl_up_sync(kAll, product, 1);
    const float factor = m < 0 ? 0.f : kept * ((threadIdx.x & 31) ? before : 1.f) * weight_of(at, m, MODE);
    const int count = min(32, first_lane(left * product < kForgotten<T>) + 1);
    add_rows(state, h, width, factor, count, [&](int i) { return base - i; });
    const float all = __shfl_sync(kAll, product, 31);
    kept *= all, left *= all;
  }
}

template <class T, int64_t MODE>
__global__ void __launch_bounds__(kThreads) dechunk_forward(Layout at, ForwardRows<T> rows, int64_t width, int span) {
  constexpr int R = kGroup<T>;
  const Run own(shared_memory<unsigned char>(), at, MODE, span);
  const int count = int(own.end - own.first);
  float state[kVec];
  fill(state, 0.f);
  if (MODE != kHard && count > 0) warm_up<T, MODE>(at, rows.h, own.first, width, state);
  int t = blockIdx.x ? own.begins[0] : 0;  // the bytes in front of all chunks are the first block's
  const int end = own.begins[max(count, 0)];
  int i = -1, stop = t, next_begin = own.begins[0];
  Row<T> h, next_h, ahead[R];
  const auto fetch = [&](int from) {
#pragma unroll
    for (int r = 0; r < R; ++r)
      if (from + r < end) ahead[r].load(rows.residual, from + r, width);
  };
  if (next_begin < end) next_h.load(rows.h, own.first, width);
  fetch(t);
  for (; t < end; t += R) {
    Row<T> residual[R];
#pragma unroll
    for (int r = 0; r < R; ++r) residual[r] = ahead[r];
    fetch(t + R);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      if (t + r >= end) break;
      if (t + r == next_begin) {  // here a chunk ends, and its state begins to be read
        ++i;
        h = next_h;
        next_begin = own.begins[i + 1];
        if (MODE == kOfficial) stop = own.stops[i];
        if (next_begin < end) next_h.load(rows.h, own.first + i + 1, width);
        blend<T>(state, MODE == kHard ? 0.f : own.decay[i], MODE == kHard ? 1.f : own.weight[i], h);
        if (MODE != kHard && rows.states) store_row<T>(rows.states, own.first + i, width, state);
      }
      float z[kVec];
      if (i < 0 || (MODE == kOfficial && t + r >= stop)) {
        fill(z, rows.null_group ? 0.f : __uint_as_float(0x7fc00000u));
        if (rows.null_group) {
          Row<T> null;
          null.load(rows.null_group, 0, width);
          blend<T>(z, 0.f, 1.f, null);
        }
      } else if (MODE == kCausal && t + r == own.begins[i]) {
        fill(z, 0.f);
        blend<T>(z, 0.f, 1.f, h);
      } else {
        fill(z, 0.f);
        add(z, state);
      }
      blend<T>(z, 1.f, 1.f, residual[r]);
      store_row<T>(rows.z, t + r, width, z);
    }
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
  float* d_confidence;  // [tiles, P] or null
  float* d_p;           // [tiles, P] or null
  float* null_sums;     // [blocks, width] or null
};

// Two sums over the width a byte, dz · read for its confidence and ds · (h - s) for its p, collected for a while.
struct Pending {
  float* values;  // [2][kPending][32 warps]
  int count = 0;
  int top;  // the byte whose sums come first; the others follow downwards
  static constexpr size_t kBytes = 2 * kPending * 32 * sizeof(float);

  __device__ __forceinline__ Pending(float* memory, int top) : values(memory), top(top) {}
  // The sums of the next `n` bytes downwards.
  __device__ __forceinline__ void add(const float (&reads)[4], const float (&ends)[4], int n) {
    const int lane = threadIdx.x & 31, g = lane >> 3, place = (count + g) * 32 + int(threadIdx.x >> 5);
    const float read = warp_sums_of_four(reads), end = warp_sums_of_four(ends);
    if ((lane & 7) == 0 && g < n) values[place] = read, values[kPending * 32 + place] = end;
    count += n;
  }
  __device__ __forceinline__ void flush(float* d_confidence, float* d_p) {
    __syncthreads();
    const int warps = int(blockDim.x) >> 5;
    for (int j = threadIdx.x; j < 2 * kPending; j += blockDim.x) {
      const int byte = j % kPending;
      float* const to = j < kPending ? d_confidence : d_p;
      if (byte >= count || !to) continue;
      float sum = 0.f;
      for (int w = 0; w < warps; ++w) sum += values[j * 32 + w];
      to[top - byte] = sum;
    }
    __syncthreads();
    top -= count, count = 0;
  }
};

// The gradient of the state of chunk first - 1 from all chunks behind: each byte's dz times the decays up to its chunk, the
// nearest first, until too little of it comes back.
template <class T, int64_t MODE>
__device__ __forceinline__ void warm_up_ahead(const Layout& at, const T* dz, int64_t first, int64_t width, Numbers& ds) {
  float kept = 1.f;
  for (int64_t base = first; base < at.chunks && kept >= kForgotten<T>; base += 32) {
    const int64_t m = base + (threadIdx.x & 31);
    const float product = product_so_far(m < at.chunks ? decay_of(at, m, MODE) : 0.f);
    const int count = first_lane(kept * product < kForgotten<T>);
    if (!count) return;
    const int64_t begin = __ldg(at.ends + base);
    const int64_t end = begin_of(at, base + count);
    for (int64_t from = begin; from < end; from += 32) {
      const int64_t t = from + (threadIdx.x & 31), chunk = t < end ? __ldg(at.chunk_of_byte + t) : -1;
      float factor = kept * __shfl_sync(kAll, product, int(max(chunk - base, int64_t(0))));
      if (chunk < base || (MODE == kCausal && __ldg(at.ends + chunk) == t)) factor = 0.f;  // reads nothing, or h
      add_rows(ds, dz, width, factor, int(min(int64_t(32), end - from)), [&](int i) { return from + i; });
    }
    if (count < 32) return;
    kept *= __shfl_sync(kAll, product, 31);
  }
}

// Blocks that a multiprocessor must have room for; 0 leaves it to ptxas. For sm_100 that of CUDA 13.0 holds one kernel to
// 80 registers, which spills.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
template <class T, int64_t MODE, bool SCALARS>
constexpr int kLeastBlocks = MODE == kHard && SCALARS && sizeof(T) == 4 ? 1 : 0;
#else
template <class T, int64_t MODE, bool SCALARS>
constexpr int kLeastBlocks = 0;
#endif

template <class T, int64_t MODE, bool SCALARS>
__global__ void __launch_bounds__(kThreads, kLeastBlocks<T, MODE, SCALARS>)
    dechunk_backward(Layout at, BackwardRows<T> rows, int64_t width, int span) {
  constexpr int R = kGroup<T>;
  constexpr bool kStates = MODE != kHard;
  unsigned char* memory = shared_memory<unsigned char>();
  const Run own(memory + Pending::kBytes, at, MODE, span);
  float ds[kVec];
  float aside[kVec];  // causal: dz of the byte that read h; official: of all that read null_group
  fill(ds, 0.f), fill(aside, 0.f);
  int i = int(own.end - own.first) - 1;
  for (int64_t m = at.chunks - 1 - blockIdx.x; m >= 0 && !is_real(at, m); m -= gridDim.x)
    store_row<T>(rows.dh, m, width, ds);  // padding
  const int lowest = blockIdx.x ? own.begins[0] : 0;
  int t = (i < 0 ? own.begins[0] : own.begins[i + 1]) - 1;
  if (kStates && own.end < at.chunks && i >= 0)
    warm_up_ahead<T, MODE>(at, rows.dz, own.end, width, ds);

  Row<T> h, state, before, next_h, next_before, ahead[R];
  const auto fetch_chunk = [&](int64_t m) {  // h of m, and the state in front of it
    if (SCALARS && m >= own.first) next_h.load(rows.h, m, width);
    if (SCALARS && kStates && m >= own.first && m > 0) next_before.load(rows.states, m - 1, width);
  };
  const auto fetch_bytes = [&](int from) {
#pragma unroll
    for (int r = 0; r < R; ++r)
      if (from - r >= lowest) ahead[r].load(rows.dz, from - r, width);
  };
  int stop = MODE == kOfficial && i >= 0 ? own.stops[i] : 0;
  fetch_bytes(t);
  fetch_chunk(own.first + i);
  if (SCALARS && kStates && i >= 0) state.load(rows.states, own.first + i, width);
  h = next_h, before = next_before;
  fetch_chunk(own.first + i - 1);
  Pending sums(reinterpret_cast<float*>(memory), t);
  float* const d_confidence = rows.d_confidence ? rows.d_confidence + blockIdx.y * at.bytes : nullptr;
  float* const d_p = rows.d_p ? rows.d_p + blockIdx.y * at.bytes : nullptr;
  for (; t >= lowest; t -= R) {
    Row<T> packed[R];
    float to_read[4] = {0.f, 0.f, 0.f, 0.f}, to_end[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int r = 0; r < R; ++r) packed[r] = ahead[r];
    fetch_bytes(t - R);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      if (t - r < lowest) break;
      float dz[kVec];
      fill(dz, 0.f);
      blend<T>(dz, 0.f, 1.f, packed[r]);
      const bool ends_chunk = i >= 0 && t - r == own.begins[i];
      if (i < 0 || (MODE == kOfficial && t - r >= stop)) {
        if (MODE == kOfficial) add(aside, dz);
        if (SCALARS && rows.null_group) {
          Row<T> null;
          null.load(rows.null_group, 0, width);
          to_read[r] = dot<T>(dz, null, width);
        }
      } else if (MODE == kCausal && ends_chunk) {
        add(aside, dz);
        if (SCALARS) to_read[r] = dot<T>(dz, h, width);
      } else {
        add(ds, dz);
        if (SCALARS) to_read[r] = dot<T>(dz, kStates ? state : h, width);
      }
      if (ends_chunk) {
        const int64_t m = own.first + i;
        float dh[kVec];
        fill(dh, 0.f);
        add(dh, ds);
        scale(dh, kStates ? own.weight[i] : 1.f);
        if (MODE == kCausal) add(dh, aside), fill(aside, 0.f);
        store_row<T>(rows.dh, m, width, dh);
        if (SCALARS && kStates && rows.d_p) {
          const float p = __ldg(at.p + t - r);
          const bool starts = at.starts[m], counts = p >= kClamp && p <= 1.f - kClamp && !(MODE == kCausal && starts);
          if (counts) to_end[r] = dot<T>(ds, h, width) - (starts ? 0.f : dot<T>(ds, before, width));
        }
        scale(ds, kStates ? own.decay[i] : 0.f);
        --i;
        if (MODE == kOfficial && i >= 0) stop = own.stops[i];
        h = next_h, state = before, before = next_before;
        fetch_chunk(m - 2);
      }
    }
    if (SCALARS) {
      sums.add(to_read, to_end, min(R, t - lowest + 1));
      if (sums.count + R > kPending) sums.flush(d_confidence, d_p);
    }
  }
  if (SCALARS) sums.flush(d_confidence, d_p);
  if (MODE == kOfficial && rows.null_sums) store_row<float>(rows.null_sums, blockIdx.x, width, aside);
}

// to[t] = sum of from[tile, t] over the tiles, in order.
__global__ void __launch_bounds__(256) add_tiles(const float* __restrict__ from, float* __restrict__ to, int64_t tiles, int64_t bytes) {
  const int64_t t = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (t >= bytes) return;
  float sum = 0.f;
  for (int64_t tile = 0; tile < tiles; ++tile) sum += from[tile * bytes + t];
  to[t] = sum;
}

// f(integral_constant<int64_t, MODE>) for a mode's code.
template <class F>
int for_mode(int64_t mode, F f) {
  if (mode == kHard) return f(std::integral_constant<int64_t, kHard>{});
  if (mode == kCausal) return f(std::integral_constant<int64_t, kCausal>{});
  if (mode == kOfficial) return f(std::integral_constant<int64_t, kOfficial>{});
  return fail(kBadArgument, "the mode code is neither 0 (hard) nor 1 (causal) nor 2 (official)");
}
// Spans of the bytes by tiles of the width.
dim3 grid_of(int64_t bytes, int64_t span, int64_t width, int64_t tile) {
  return dim3(unsigned(max(int64_t(1), ceil_div(bytes, span))), unsigned(ceil_div(width, tile)));
}
int refuse(int64_t bytes, int64_t span, int64_t width, int64_t tile) {
  if (bytes > INT32_MAX) return fail(kBadArgument, "there are more bytes than 2^31 - 1");
  if (span < 1 || span > kMaxSpan) return fail(kBadArgument, "a block takes 1 to 512 bytes");
  if (width < kVec || width % kVec) return fail(kBadArgument, "the width is not a multiple of 8");
  if (tile < 32 * kVec || tile > kThreads * kVec || tile % (32 * kVec))
    return fail(kBadArgument, "a tile is not a multiple of 256 up to 2048");
  return 0;
}

}  // namespace
}  // namespace mbk

// h [chunks, width], p [bytes] fp32, residual [bytes, width], null_group [width] or null; the layout as in struct Layout.
// Out: z [bytes, width]; states [chunks, width] or null. span: bytes of a block, at most 512; tile: its part of the width.
MBK_API int mbk_dechunk_forward(const void* h, const float* p, const void* residual, const void* null_group,
                                const int64_t* ends, const int64_t* chunk_of_byte, const uint8_t* starts, void* z,
                                void* states, int64_t chunks, int64_t bytes, int64_t width, int64_t span, int64_t tile,
                                int64_t mode, int64_t dtype, void* stream) {
  using namespace mbk;
  if (const int code = refuse(bytes, span, width, tile)) return code;
  if (bytes == 0) return 0;
  return for_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    return for_mode(mode, [&](auto which) {
      const Layout at{ends, chunk_of_byte, starts, p, chunks, bytes};
      const ForwardRows<T> rows{static_cast<const T*>(h), static_cast<const T*>(residual),
                                static_cast<const T*>(null_group), static_cast<T*>(z), static_cast<T*>(states)};
      return launch(dechunk_forward<T, decltype(which)::value>, grid_of(bytes, span, width, tile), dim3(unsigned(tile / kVec)),
                    Run::bytes_of(span), stream, at, rows, width, int(span));
    });
  });
}

// dz [bytes, width]. Out: dh [chunks, width]; d_confidence, d_p [bytes] fp32 and d_null [width], null where not wanted.
// states: of the forward pass, where a scalar gradient is wanted outside hard mode. Scratch in fp32: null_sums
// [ceil(bytes / span), width] where d_null is wanted; tile_sums [2, tiles, bytes] where a scalar gradient is wanted and
// the width has several tiles.
MBK_API int mbk_dechunk_backward(const void* dz, const void* h, const void* states, const float* p, const void* null_group,
                                 const int64_t* ends, const int64_t* chunk_of_byte, const uint8_t* starts, void* dh,
                                 float* d_confidence, float* d_p, void* d_null, float* null_sums, float* tile_sums,
                                 int64_t chunks, int64_t bytes, int64_t width, int64_t span, int64_t tile, int64_t mode,
                                 int64_t dtype, void* stream) {
  using namespace mbk;
  if (const int code = refuse(bytes, span, width, tile)) return code;
  const dim3 grid = grid_of(bytes, span, width, tile);
  float* const confidence_sums = tile_sums && d_confidence ? tile_sums : d_confidence;
  float* const p_sums = tile_sums && d_p ? tile_sums + grid.y * bytes : d_p;
  return for_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    int code = for_mode(mode, [&](auto which) {
      constexpr int64_t kMode = decltype(which)::value;
      const Layout at{ends, chunk_of_byte, starts, p, chunks, bytes};
      const BackwardRows<T> rows{static_cast<const T*>(dz), static_cast<const T*>(h), static_cast<const T*>(states),
                                 static_cast<const T*>(null_group), static_cast<T*>(dh), confidence_sums, p_sums, null_sums};
      const auto kernel = d_confidence || d_p ? dechunk_backward<T, kMode, true> : dechunk_backward<T, kMode, false>;
      return launch(kernel, grid, dim3(unsigned(tile / kVec)), Pending::kBytes + Run::bytes_of(span), stream, at, rows, width, int(span));
    });
    const dim3 blocks(unsigned(max(int64_t(1), ceil_div<int64_t>(bytes, 256))));
    for (int which = 0; which < 2 && tile_sums && !code; ++which) {
      float* const to = which ? d_p : d_confidence;
      const float* const from = which ? p_sums : confidence_sums;
      if (to) code = launch(add_tiles, blocks, dim3(256), 0, stream, from, to, int64_t(grid.y), bytes);
    }
    if (code || !d_null) return code;
    return sum_rows(null_sums, static_cast<T*>(d_null), int64_t(grid.x), width, stream);
  });
}
