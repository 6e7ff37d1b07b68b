#include <tuple>

#include "tensors.h"

namespace moescale {

Tensor swiglu(const Tensor& gate_up, const MaybeTensor& weight_TK, const MaybeTensor& visit_R) {
  STD_TORCH_CHECK(weight_TK.has_value() == visit_R.has_value(), "weight_TK and visit_R come together");
  const int64_t rows = gate_up.size(0), width = gate_up.size(1) / 2;
  const int64_t* visits = elements<int64_t>(visit_R, "visit_R");
  Tensor act_RF = torch::stable::new_empty(gate_up, {rows, width});
  with_row_type(gate_up, "gate_up", [&](auto type) {
    using T = decltype(type);
    const T* in = elements<T>(gate_up, "gate_up");
    const Sum<T>* weights = elements<Sum<T>>(weight_TK, "weight_TK");
    T* out = elements<T>(act_RF, "act_RF");
    for_each_range(rows, width, [&](int64_t begin, int64_t end) {
      row_kernels<T>().swiglu(in, weights, visits, width, out, rows, begin, end);
    });
  });
  return act_RF;
}

std::tuple<Tensor, Tensor> swiglu_backward(const Tensor& grad_act_RF, const Tensor& gate_up,
                                           const MaybeTensor& weight_TK, const MaybeTensor& visit_R) {
  STD_TORCH_CHECK(weight_TK.has_value() == visit_R.has_value(), "weight_TK and visit_R come together");
  const int64_t rows = gate_up.size(0), width = gate_up.size(1) / 2;
  const int64_t* visits = elements<int64_t>(visit_R, "visit_R");
  Tensor grad_gate_up = torch::stable::new_empty(gate_up, {rows, 2 * width});
  return with_row_type(gate_up, "gate_up", [&](auto type) {
    using T = decltype(type);
    Tensor grad_weight_TK = weight_TK.has_value()
                                ? torch::stable::new_zeros(*weight_TK, {weight_TK->size(0), weight_TK->size(1)})
                                : torch::stable::new_empty(gate_up, {0}, kScalarType<Sum<T>>);
    const T* in = elements<T>(gate_up, "gate_up");
    const Sum<T>* weights = elements<Sum<T>>(weight_TK, "weight_TK");
    T *act = elements<T>(grad_act_RF, "grad_act_RF"), *out = elements<T>(grad_gate_up, "grad_gate_up");
    Sum<T>* grad_weights = elements<Sum<T>>(grad_weight_TK, "grad_weight_TK");
    for_each_range(rows, 2 * width, [&](int64_t begin, int64_t end) {
      row_kernels<T>().swiglu_backward(act, in, weights, visits, width, out, grad_weights, rows, begin, end);
    });
    return std::tuple{grad_gate_up, grad_weight_TK};
  });
}

}  // namespace moescale

STABLE_TORCH_LIBRARY_IMPL(moescale, CPU, library) {
  library.impl("swiglu", TORCH_BOX(&moescale::swiglu));
  library.impl("swiglu_backward", TORCH_BOX(&moescale::swiglu_backward));
}
