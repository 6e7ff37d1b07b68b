// The weighted sum of each token's rows, and its gradients.
#pragma once

#include <algorithm>

#include "arithmetic.h"

namespace moescale::MOESCALE_ISA {

// Columns that one pass over the K rows adds up: they stay in registers, so that each row is read once and the sum is
// written once. Bytes: R * D read, T * D written.
constexpr int64_t kColumns = 64;

// Adds `count` columns, beginning at `column`, of token t's rows in the order of its visits. count <= kColumns.
template <class T>
inline void combine_columns(const T* rows_RD, const int64_t* row_K, const Sum<T>* weight_K, int64_t active,
                            int64_t width, int64_t column, int64_t count, T* out_D) {
  Sum<T> sum[kColumns] = {};
  for (int64_t k = 0; k < active; ++k) {
    if (row_K[k] < 0) continue;
    const T* row = rows_RD + row_K[k] * width + column;
    const Sum<T> weight = weight_K ? weight_K[k] : Sum<T>(1);
    if (count == kColumns) {
      for (int64_t i = 0; i < kColumns; ++i) sum[i] += weight * widen(row[i]);
    } else {
      for (int64_t i = 0; i < count; ++i) sum[i] += weight * widen(row[i]);
    }
  }
  for (int64_t i = 0; i < count; ++i) store(out_D + column + i, sum[i]);
}

template <class T>
void combine(const T* rows_RD, const int64_t* row_TK, const Sum<T>* weight_TK, int64_t active, int64_t width,
             T* out_TD, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    const Sum<T>* weight_K = weight_TK ? weight_TK + t * active : nullptr;
    for (int64_t column = 0; column < width; column += kColumns) {
      combine_columns<T>(rows_RD, row_TK + t * active, weight_K, active, width, column,
                         std::min(kColumns, width - column), out_TD + t * width);
    }
  }
}

// Each row's gradient is its token's, times the visit's weight; the weight's gradient is the dot product of both rows.
// Bytes: 2 R * D read, R * D written.
template <class T>
void combine_backward(const T* grad_TD, const T* rows_RD, const int64_t* visit_R, const Sum<T>* weight_TK,
                      int64_t active, int64_t width, T* grad_rows_RD, Sum<T>* grad_weight_TK, int64_t begin,
                      int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    T* grad_row = grad_rows_RD + r * width;
    const int64_t visit = visit_R[r];
    if (visit < 0) {
      std::memset(grad_row, 0, width * sizeof(T));
      continue;
    }
    const T* grad = grad_TD + visit / active * width;
    const T* row = rows_RD + r * width;
    const Sum<T> weight = weight_TK[visit];
    Sum<T> lanes[kLanes] = {};
    for_each_place(width, [&](int64_t column, int lane) {
      const Sum<T> g = widen(grad[column]);
      lanes[lane] += g * widen(row[column]);
      store(grad_row + column, weight * g);
    });
    grad_weight_TK[visit] = sum_lanes(lanes);
  }
}

}  // namespace moescale::MOESCALE_ISA
