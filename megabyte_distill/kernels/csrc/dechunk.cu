// F4: chunk states to bytes, plus a residual; and all gradients, the straight-through confidence's among them.
//
//   s_m = (1 - w_m) s_{m-1} + w_m h_m       w_m = p at the chunk's end, clamped; s starts anew with each segment
//   z_t = read_t + residual_t               read_t = h or s of the last chunk that ended at or before t, by mode
//
// A block holds the chunks that end in its span of the bytes, with the bytes that read them, over the whole width or, where
// that is large, a tile of it; sums over the width need no atomics. No state passes between blocks: a block begins with
// the sum of the chunks in front, each times the product of the decays in between, as far back as that product matters (or
// a segment begins); the backward pass does the same ahead.
// Then it walks its bytes, a few rows at a time while the next few are on their way; chunks change in between. Forward in
// hard mode there is nothing to carry: each byte's row is made alone.
#include "dechunk_forward.h"
#include "dechunk_backward.h"

namespace mbk {
namespace {

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
// Out: z [bytes, width]; states [chunks, width] or null. span: bytes of a block, at most 512 (not in
// hard mode); tile: its part of the width.
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
      constexpr int64_t kMode = decltype(which)::value;
      const Layout at{ends, chunk_of_byte, starts, p, chunks, bytes};
      const ForwardRows<T> rows{static_cast<const T*>(h), static_cast<const T*>(residual),
                                static_cast<const T*>(null_group), static_cast<T*>(z), static_cast<T*>(states)};
      const dim3 threads(unsigned(tile / kVec));
      if constexpr (kMode == kHard)
        return launch(dechunk_hard_forward<T>, grid_of(bytes, kHardRows, width, tile), threads, 0, stream, chunk_of_byte, rows,
                      bytes, width);
      else
        return launch(dechunk_forward<T, kMode>, grid_of(bytes, span, width, tile), threads, Run::bytes_of(span), stream, at,
                      rows, width, int(span));
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
