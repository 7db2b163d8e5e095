// F1: rows of a byte table, plus a state that is there already, then RMSNorm; and all its gradients.
//
//   x_t = table[id_t] + added_t          kept in fp32, the residual stream, if the caller wants it
//   y_t = x_t * scale_t * weight         scale_t = 1 / sqrt(mean(x_t^2) + eps)
//
// Without an added state there are only 256 different rows: they are normed first, and each byte takes its own; the
// gradient is summed by id first and goes through the norm of 256 rows. Sums by id use no atomics: the bytes are sorted,
// stably; a block walks one piece of the sorted order and keeps the sum of the current id in registers. A run of equal
// ids inside a piece is finished there, one that crosses pieces leaves a partial sum in each, and another kernel adds
// those up in order.
#include "byte_embedding_forward.h"
#include "byte_embedding_order.h"
#include "byte_embedding_sums.h"
#include "byte_embedding_backward.h"

// ids [rows]; table [ids_in_table, width]; added [rows, width] or null. Out: stream_out [rows, width] fp32.
MBK_API int mbk_byte_embedding_stream(const int64_t* ids, const void* table, const void* added, float* stream_out,
                                      int64_t rows, int64_t width, int64_t ids_in_table, int64_t dtype, void* stream) {
  using namespace mbk;
  if (rows == 0) return 0;
  return for_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    int threads;
    const dim3 grid = flat_grid(ceil_div<int64_t>(rows, kGatherRows), width, kNumbers<float>, &threads);
    const auto kernel = added ? gather_rows<T, float, true> : gather_rows<T, float, false>;
    return launch(kernel, grid, dim3(threads), 0, stream, ids, static_cast<const T*>(table), static_cast<const T*>(added),
                  stream_out, rows, width, ids_in_table);
  });
}

// As above with a norm of weight [width] and no added state. Out: normed_table and scale [ids_in_table(, width)],
// normed [rows, width].
MBK_API int mbk_byte_embedding_normed(const int64_t* ids, const void* table, const void* weight, void* normed_table,
                                      float* scale, void* normed, int64_t rows, int64_t width, int64_t ids_in_table,
                                      double eps, int64_t dtype, void* stream) {
  using namespace mbk;
  return for_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    const int code = launch(norm_table<T>, dim3(unsigned(ids_in_table)), dim3(kFlatThreads),
                            BlockSums<1>::kFloats * sizeof(float), stream, static_cast<const T*>(table),
                            static_cast<const T*>(weight), static_cast<T*>(normed_table), scale, width, float(eps));
    if (code || rows == 0) return code;
    int threads;
    const dim3 grid = flat_grid(ceil_div<int64_t>(rows, kGatherRows), width, kNumbers<T>, &threads);
    return launch(gather_rows<T, T, false>, grid, dim3(threads), 0, stream, ids, static_cast<const T*>(normed_table),
                  static_cast<const T*>(nullptr), static_cast<T*>(normed), rows, width, ids_in_table);
  });
}

// With an added state and a norm. Out: stream_out [rows, width] fp32 or null, normed [rows, width], scale [rows].
MBK_API int mbk_byte_embedding_added_normed(const int64_t* ids, const void* table, const void* added, const void* weight,
                                            float* stream_out, void* normed, float* scale, int64_t rows, int64_t width,
                                            int64_t ids_in_table, double eps, int64_t dtype, void* stream) {
  using namespace mbk;
  if (rows == 0) return 0;
  return for_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    return for_width(width, [&](auto passes, int threads) {
      constexpr int P = decltype(passes)::value;
      return launch(norm_sums_forward<T, P>, dim3(unsigned(ceil_div<int64_t>(rows, kNormRowsPerBlock))), dim3(threads),
                    BlockSums<kNormRows<P>>::kFloats * sizeof(float), stream, ids, static_cast<const T*>(table),
                    static_cast<const T*>(added), static_cast<const T*>(weight), stream_out, static_cast<T*>(normed), scale,
                    rows, width, ids_in_table, float(eps));
    });
  });
}

// order [rows] and run_starts [257] int32 of ids [rows]; counts [64, 256] int32 is scratch.
MBK_API int mbk_byte_order(const int64_t* ids, int* counts, int* order, int* run_starts, int64_t rows,
                           int64_t ids_in_table, void* stream) {
  using namespace mbk;
  if (ids_in_table < 0 || ids_in_table > kIds) return fail(kBadArgument, "a table has at most 256 rows");
  const int64_t span = max(int64_t(1), ceil_div<int64_t>(rows, kOrderBlocks * kOrderThreads)) * kOrderThreads;
  const int blocks = int(max(int64_t(1), ceil_div(rows, span)));
  const int code = launch(count_ids, dim3(blocks), dim3(kOrderThreads), kIds * sizeof(int), stream, ids, counts, rows, span,
                          ids_in_table);
  if (code) return code;
  return launch(place_ids, dim3(blocks), dim3(kOrderThreads), (kOrderWarps * kIds + kOrderWarps) * sizeof(int), stream, ids,
                counts, order, run_starts, rows, span, blocks, ids_in_table);
}

// Gradients of mbk_byte_embedding_stream: d_table [ids_in_table, width], d_added [rows, width] or null. parts
// [pieces, 2, width] fp32 is scratch for pieces = ceil(rows / piece).
MBK_API int mbk_byte_embedding_stream_backward(const float* d_stream, const int64_t* ids, const int* order,
                                               const int* run_starts, void* d_table, void* d_added, float* parts,
                                               int64_t rows, int64_t width, int64_t ids_in_table, int64_t piece,
                                               int64_t dtype, void* stream) {
  using namespace mbk;
  const Order sorted{ids, order, run_starts, rows, ids_in_table, int(piece)};
  return for_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    return sum_rows_by_id(d_stream, sorted, static_cast<T*>(d_table), parts, static_cast<T*>(d_added), width, stream);
  });
}

// Gradients of mbk_byte_embedding_normed, and of the stream of the same bytes where d_stream is not null: d_table or null,
// d_weight [width] or null. Scratch in fp32: stream_sums, normed_sums, norm_sums [ids_in_table, width], parts as above.
MBK_API int mbk_byte_embedding_normed_backward(const float* d_stream, const void* d_normed, const int64_t* ids,
                                               const int* order, const int* run_starts, const void* table,
                                               const void* weight, const float* scale, void* d_table, void* d_weight,
                                               float* stream_sums, float* normed_sums, float* norm_sums, float* parts,
                                               int64_t rows, int64_t width, int64_t ids_in_table, int64_t piece,
                                               int64_t dtype, void* stream) {
  using namespace mbk;
  const Order sorted{ids, order, run_starts, rows, ids_in_table, int(piece)};
  return for_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    float* const none = nullptr;
    int code = d_stream ? sum_rows_by_id(d_stream, sorted, stream_sums, parts, none, width, stream) : 0;
    if (!code) code = sum_rows_by_id(static_cast<const T*>(d_normed), sorted, normed_sums, parts, none, width, stream);
    if (code) return code;
    code = launch(norm_table_backward<T>, dim3(unsigned(ids_in_table)), dim3(kFlatThreads),
                  BlockSums<1>::kFloats * sizeof(float), stream, d_stream ? stream_sums : none, normed_sums,
                  static_cast<const T*>(table), static_cast<const T*>(weight), scale, static_cast<T*>(d_table),
                  d_weight ? norm_sums : none, width);
    if (code || !d_weight) return code;
    return sum_rows(norm_sums, static_cast<T*>(d_weight), ids_in_table, width, stream);
  });
}

// Gradients of mbk_byte_embedding_added_normed; d_stream may be null. d_table, d_added, d_weight or null. Scratch in fp32:
// dx [rows, width] and parts where d_table is wanted (order and run_starts too), norm_sums [pieces, width] for d_weight.
MBK_API int mbk_byte_embedding_added_normed_backward(
    const float* d_stream, const void* d_normed, const int64_t* ids, const int* order, const int* run_starts,
    const void* table, const void* added, const void* weight, const float* scale, void* d_table, void* d_added,
    void* d_weight, float* dx, float* norm_sums, float* parts, int64_t rows, int64_t width, int64_t ids_in_table,
    int64_t piece, int64_t dtype, void* stream) {
  using namespace mbk;
  return for_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    const int64_t pieces = ceil_div(rows, piece);
    int code = !rows ? 0 : for_width(width, [&](auto passes, int threads) {
      constexpr int P = decltype(passes)::value;
      return launch(norm_sums_backward<T, P>, dim3(unsigned(pieces)), dim3(threads),
                    BlockSums<kNormRows<P>>::kFloats * sizeof(float), stream, d_stream, static_cast<const T*>(d_normed), ids,
                    static_cast<const T*>(table), static_cast<const T*>(added), static_cast<const T*>(weight), scale,
                    d_table ? dx : static_cast<float*>(nullptr), static_cast<T*>(d_added),
                    d_weight ? norm_sums : static_cast<float*>(nullptr), rows, width, ids_in_table, int(piece));
    });
    if (!code && d_table) {
      const Order sorted{ids, order, run_starts, rows, ids_in_table, int(piece)};
      code = sum_rows_by_id(static_cast<const float*>(dx), sorted, static_cast<T*>(d_table), parts,
                            static_cast<T*>(nullptr), width, stream);
    }
    if (code || !d_weight) return code;
    return sum_rows(norm_sums, static_cast<T*>(d_weight), pieces, width, stream);
  });
}
