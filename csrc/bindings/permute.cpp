#include "tensors.h"

namespace moescale {

Tensor permute(const Tensor& x_TD, const Tensor& visit_R, int64_t active) {
  const int64_t rows = visit_R.size(0), width = x_TD.size(1);
  const int64_t* visits = elements<int64_t>(visit_R, "visit_R");
  Tensor rows_RD = torch::stable::new_empty(x_TD, {rows, width});
  with_row_type(x_TD, "x_TD", [&](auto type) {
    using T = decltype(type);
    const T* x = elements<T>(x_TD, "x_TD");
    T* out = elements<T>(rows_RD, "rows_RD");
    for_each_range(rows, width, [&](int64_t begin, int64_t end) {
      row_kernels<T>().permute(x, visits, active, width, out, begin, end);
    });
  });
  return rows_RD;
}

}  // namespace moescale

STABLE_TORCH_LIBRARY_IMPL(moescale, CPU, library) { library.impl("permute", TORCH_BOX(&moescale::permute)); }
