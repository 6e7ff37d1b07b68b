#include <tuple>

#include "tensors.h"

namespace moescale {

Tensor combine(const Tensor& rows_RD, const Tensor& row_TK, const MaybeTensor& weight_TK) {
  const int64_t tokens = row_TK.size(0), active = row_TK.size(1), width = rows_RD.size(1);
  const int64_t* row_of_visit = elements<int64_t>(row_TK, "row_TK");
  Tensor out_TD = torch::stable::new_empty(rows_RD, {tokens, width});
  with_row_type(rows_RD, "rows_RD", [&](auto type) {
    using T = decltype(type);
    const T* rows = elements<T>(rows_RD, "rows_RD");
    const Sum<T>* weights = elements<Sum<T>>(weight_TK, "weight_TK");
    T* out = elements<T>(out_TD, "out_TD");
    for_each_range(tokens, active * width, [&](int64_t begin, int64_t end) {
      row_kernels<T>().combine(rows, row_of_visit, weights, active, width, out, tokens, begin, end);
    });
  });
  return out_TD;
}

std::tuple<Tensor, Tensor> combine_backward(const Tensor& grad_TD, const Tensor& rows_RD, const Tensor& visit_R,
                                            const Tensor& weight_TK) {
  const int64_t rows = visit_R.size(0), active = weight_TK.size(1), width = rows_RD.size(1);
  const int64_t* visits = elements<int64_t>(visit_R, "visit_R");
  Tensor grad_rows_RD = torch::stable::new_empty(rows_RD, {rows, width});
  Tensor grad_weight_TK = torch::stable::new_zeros(weight_TK, {weight_TK.size(0), active});
  with_row_type(rows_RD, "rows_RD", [&](auto type) {
    using T = decltype(type);
    const T *grad = elements<T>(grad_TD, "grad_TD"), *row = elements<T>(rows_RD, "rows_RD");
    const Sum<T>* weights = elements<Sum<T>>(weight_TK, "weight_TK");
    T* grad_rows = elements<T>(grad_rows_RD, "grad_rows_RD");
    Sum<T>* grad_weights = elements<Sum<T>>(grad_weight_TK, "grad_weight_TK");
    for_each_range(rows, width, [&](int64_t begin, int64_t end) {
      row_kernels<T>().combine_backward(grad, row, visits, weights, active, width, grad_rows, grad_weights, rows, begin,
                                        end);
    });
  });
  return {grad_rows_RD, grad_weight_TK};
}

}  // namespace moescale

STABLE_TORCH_LIBRARY_IMPL(moescale, CPU, library) {
  library.impl("combine", TORCH_BOX(&moescale::combine));
  library.impl("combine_backward", TORCH_BOX(&moescale::combine_backward));
}
