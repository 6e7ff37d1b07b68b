// The weighted sum of each token's rows, and its gradients.
#pragma once

#include "arithmetic.h"
#include "stream.h"
#include "sums.h"

namespace moescale::MOESCALE_ISA {

// One pass over the K rows adds up a cache line: the sum stays in registers, so that each row is read once and the sum
// is written once; more lines at a time would ask for more of the next rows at once than are under way together.
// Bytes: R * D read, T * D written.
template <class T>
constexpr int64_t kColumns = kLine / static_cast<int64_t>(sizeof(T));

// One token's rows, in the order of its visits, and those of the next.
template <class T>
struct Visits {
  const T* rows_RD;
  const int64_t *row_K, *next_K;
  const Sum<T>* weight_K;
  int64_t active, width;

  // Calls add(row, weight) for each, and fetches the same part of the next token's rows: these lie anywhere, so that
  // the processor cannot guess them.
  template <class Add>
  inline void each(int64_t column, const Add& add) const {
    for (int64_t k = 0; k < active; ++k) {
      if (next_K[k] >= 0) __builtin_prefetch(rows_RD + next_K[k] * width + column);
      if (row_K[k] >= 0) add(rows_RD + row_K[k] * width + column, weight_K ? weight_K[k] : Sum<T>(1));
    }
  }
};

// A line of the sum, from `column` on.
template <bool kStream, class T>
inline void combine_line(const Visits<T>& visits, int64_t column, T* out_D) {
  constexpr int kVectors = kLine / kVector, n = kVector / static_cast<int>(sizeof(T));
  VectorSum<T> sum[kVectors];
  visits.each(column, [&](const T* row, Sum<T> weight) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[v].add(row + v * n, weight);
  });
  alignas(kLine) T line[kColumns<T>];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) sum[v].save(line + v * n);
  copy<kStream>(out_D + column, line, kLine);
}

// The columns that fill no line: [column, width). Rows of whole lines have none.
template <class T>
inline void combine_rest(const Visits<T>& visits, int64_t column, T* out_D) {
  const int64_t count = visits.width - column;
  Sum<T> sum[kColumns<T>] = {};
  visits.each(column, [&](const T* row, Sum<T> weight) {
    for (int64_t i = 0; i < count; ++i) sum[i] += weight * widen(row[i]);
  });
  for (int64_t i = 0; i < count; ++i) store(out_D + column + i, sum[i]);
}

template <bool kStream, class T>
void combine_tokens(const T* rows_RD, const int64_t* row_TK, const Sum<T>* weight_TK, int64_t active, int64_t width,
                    T* out_TD, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    const int64_t *row_K = row_TK + t * active, *next_K = t + 1 < end ? row_K + active : row_K;
    const Visits<T> visits{rows_RD, row_K, next_K, weight_TK ? weight_TK + t * active : nullptr, active, width};
    T* out_D = out_TD + t * width;
    int64_t column = 0;
    for (; column + kColumns<T> <= width; column += kColumns<T>) combine_line<kStream>(visits, column, out_D);
    if (column < width) combine_rest(visits, column, out_D);
  }
}

template <class T>
void combine(const T* rows_RD, const int64_t* row_TK, const Sum<T>* weight_TK, int64_t active, int64_t width,
             T* out_TD, int64_t tokens, int64_t begin, int64_t end) {
  const int64_t row_bytes = width * sizeof(T);
  if (streams(out_TD, row_bytes, tokens * row_bytes)) {
    combine_tokens<true>(rows_RD, row_TK, weight_TK, active, width, out_TD, begin, end);
    fence();
  } else {
    combine_tokens<false>(rows_RD, row_TK, weight_TK, active, width, out_TD, begin, end);
  }
}

// `count` <= kLanes columns of a row's gradient, and their share of the weight's.
template <class T>
inline void scale_columns(const T* grad, const T* row, Sum<T> weight, int count, T* grad_row, Sum<T>* lanes) {
#pragma GCC ivdep
  for (int i = 0; i < count; ++i) {
    const Sum<T> g = widen(grad[i]);
    lanes[i] += g * widen(row[i]);
    store(grad_row + i, weight * g);
  }
}

template <bool kStream, class T>
Sum<T> scale_row(const T* grad, const T* row, Sum<T> weight, int64_t width, T* grad_row) {
  Sum<T> lanes[kLanes] = {};
  alignas(kLine) T columns[kLanes];  // whole lines
  int64_t first = 0;
  for (; first + kLanes <= width; first += kLanes) {
    scale_columns(grad + first, row + first, weight, kLanes, columns, lanes);
    copy<kStream>(grad_row + first, columns, sizeof columns);
  }
  scale_columns(grad + first, row + first, weight, static_cast<int>(width - first), grad_row + first, lanes);
  return sum_lanes(lanes);
}

// Each row's gradient is its token's, times the visit's weight; the weight's gradient is the dot product of both rows.
// Bytes: 2 R * D read, R * D written.
template <class T>
void combine_backward(const T* grad_TD, const T* rows_RD, const int64_t* visit_R, const Sum<T>* weight_TK,
                      int64_t active, int64_t width, T* grad_rows_RD, Sum<T>* grad_weight_TK, int64_t rows,
                      int64_t begin, int64_t end) {
  const int64_t row_bytes = width * sizeof(T);
  const bool stream = streams(grad_rows_RD, row_bytes, rows * row_bytes);
  const auto scale = stream ? scale_row<true, T> : scale_row<false, T>;
  for (int64_t r = begin; r < end; ++r) {
    T* grad_row = grad_rows_RD + r * width;
    const int64_t visit = visit_R[r];
    if (visit < 0) {
      std::memset(grad_row, 0, row_bytes);
      continue;
    }
    grad_weight_TK[visit] =
        scale(grad_TD + visit / active * width, rows_RD + r * width, weight_TK[visit], width, grad_row);
  }
  if (stream) fence();
}

}  // namespace moescale::MOESCALE_ISA
