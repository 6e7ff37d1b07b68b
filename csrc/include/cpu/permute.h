// Rows ordered by expert: a copy of each visit's token.
#pragma once

#include "arithmetic.h"
#include "stream.h"

namespace moescale::MOESCALE_ISA {

// Goes by token, so that x is read once and in order, whatever the order of the rows: tokens [begin, end) are copied to
// their rows. Bytes: T * D read, R * D written.
template <class T>
void permute(const T* x_TD, const int64_t* row_TK, int64_t active, int64_t width, T* rows_RD, int64_t rows,
             int64_t begin, int64_t end) {
  const int64_t row_bytes = width * sizeof(T);
  const auto copies = [&](auto copy_row) {
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t k = 0; k < active; ++k) {
        const int64_t row = row_TK[t * active + k];
        if (0 <= row && row < rows) copy_row(rows_RD + row * width, x_TD + t * width, row_bytes);
      }
    }
  };
  if (streams(rows_RD, row_bytes, rows * row_bytes)) {
    copies(copy<true>);
    fence();
  } else {
    copies(copy<false>);
  }
}

// The same by row, for rows that are not all in one place: row r is token visit_R[r] / active, or zeros at -1.
template <class T>
void gather(const T* x_TD, const int64_t* visit_R, int64_t active, int64_t width, T* rows_RD, int64_t begin,
            int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    T* row = rows_RD + r * width;
    if (visit_R[r] < 0) {
      std::memset(row, 0, width * sizeof(T));
    } else {
      std::memcpy(row, x_TD + visit_R[r] / active * width, width * sizeof(T));
    }
  }
}

}  // namespace moescale::MOESCALE_ISA
