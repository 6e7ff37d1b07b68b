// Rows ordered by expert: a copy of each visit's token. Bytes: R * D read, R * D written.
#pragma once

#include "arithmetic.h"

namespace moescale::MOESCALE_ISA {

template <class T>
void permute(const T* x_TD, const int64_t* visit_R, int64_t active, int64_t width, T* rows_RD, int64_t begin,
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
