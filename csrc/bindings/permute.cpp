#include <cstring>

#include "tensors.h"

namespace moescale {

Tensor permute(const Tensor& x_TD, const Tensor& visit_R, const Tensor& row_TK) {
  const int64_t rows = visit_R.size(0), width = x_TD.size(1), tokens = row_TK.size(0), active = row_TK.size(1);
  STD_TORCH_CHECK(x_TD.size(0) == tokens, "x_TD has ", x_TD.size(0), " tokens, row_TK has ", tokens);
  const int64_t *visit_of_row = elements<int64_t>(visit_R, "visit_R"), *row_of_visit = elements<int64_t>(row_TK, "row_TK");
  Tensor rows_RD = torch::stable::new_empty(x_TD, {rows, width});
  with_row_type(x_TD, "x_TD", [&](auto type) {
    using T = decltype(type);
    const T* x = elements<T>(x_TD, "x_TD");
    T* out = elements<T>(rows_RD, "rows_RD");
    for_each_range(tokens, active * width, [&](int64_t begin, int64_t end) {
      row_kernels<T>().permute(x, row_of_visit, active, width, out, rows, begin, end);
    });
    for (int64_t r = 0; r < rows; ++r) {
      if (visit_of_row[r] < 0) std::memset(out + r * width, 0, width * sizeof(T));
    }
  });
  return rows_RD;
}

}  // namespace moescale

STABLE_TORCH_LIBRARY_IMPL(moescale, CPU, library) { library.impl("permute", TORCH_BOX(&moescale::permute)); }
