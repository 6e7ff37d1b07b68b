#include "../include/cuda/swiglu.cuh"

#include "tensors.h"

namespace moescale::cuda {
namespace {

void check_arguments(const Tensor& gate_up, const std::optional<Tensor>& weight_TK,
                     const std::optional<Tensor>& visit_R) {
  check_rows(gate_up, "gate_up", gate_up.scalar_type(), gate_up);
  STD_TORCH_CHECK(gate_up.size(1) % (2 * kWidthMultiple) == 0, "gate_up has rows of ", gate_up.size(1),
                  " elements; each half must be a multiple of ", kWidthMultiple);
  check_count("rows", gate_up.size(0), 0, kMostRows);
  STD_TORCH_CHECK(weight_TK.has_value() == visit_R.has_value(),
                  "weight_TK and visit_R go together: give both, or neither");
  if (!weight_TK.has_value()) return;
  check_tensor(*weight_TK, "weight_TK", ScalarType::Float, 2, gate_up);
  check_tensor(*visit_R, "visit_R", ScalarType::Long, 1, gate_up);
  check_size(*visit_R, "visit_R", 0, gate_up.size(0));
}

RowWeights row_weights(const std::optional<Tensor>& weight_TK, const std::optional<Tensor>& visit_R) {
  if (!weight_TK.has_value()) return {nullptr, nullptr, 0};
  return {weight_TK->const_data_ptr<float>(), visit_R->const_data_ptr<int64_t>(), weight_TK->numel()};
}

Tensor swiglu(Tensor gate_up, std::optional<Tensor> weight_TK, std::optional<Tensor> visit_R) {
  check_arguments(gate_up, weight_TK, visit_R);
  const DeviceGuard guard(gate_up.get_device_index());
  const int64_t rows = gate_up.size(0);
  const int64_t width = gate_up.size(1) / 2;
  Tensor act_RF = torch::stable::new_empty(gate_up, {rows, width});
  dispatch_dtype(gate_up, "gate_up", [&](auto type) {
    using T = typename decltype(type)::type;
    launch_swiglu(static_cast<const T*>(elements<T>(gate_up)), row_weights(weight_TK, visit_R), elements<T>(act_RF),
                  rows, width, stream_of(gate_up));
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return act_RF;
}

std::tuple<Tensor, Tensor> swiglu_backward(Tensor grad_act_RF, Tensor gate_up, std::optional<Tensor> weight_TK,
                                           std::optional<Tensor> visit_R) {
  check_arguments(gate_up, weight_TK, visit_R);
  check_rows(grad_act_RF, "grad_act_RF", gate_up.scalar_type(), gate_up);
  const int64_t rows = gate_up.size(0);
  const int64_t width = gate_up.size(1) / 2;
  check_size(grad_act_RF, "grad_act_RF", 0, rows);
  check_size(grad_act_RF, "grad_act_RF", 1, width);
  const DeviceGuard guard(gate_up.get_device_index());

  Tensor grad_gate_up = torch::stable::new_empty(gate_up, {rows, 2 * width});
  Tensor grad_weight = weight_TK.has_value()
                           ? torch::stable::new_zeros(*weight_TK, {weight_TK->size(0), weight_TK->size(1)})
                           : torch::stable::new_empty(gate_up, {0}, ScalarType::Float);
  dispatch_dtype(gate_up, "gate_up", [&](auto type) {
    using T = typename decltype(type)::type;
    launch_swiglu_backward(elements<T>(grad_act_RF), static_cast<const T*>(elements<T>(gate_up)),
                           row_weights(weight_TK, visit_R), elements<T>(grad_gate_up),
                           grad_weight.mutable_data_ptr<float>(), rows, width, stream_of(gate_up));
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {grad_gate_up, grad_weight};
}

}  // namespace
}  // namespace moescale::cuda

STABLE_TORCH_LIBRARY_IMPL(moescale, CUDA, m) {
  m.impl("swiglu", TORCH_BOX(&moescale::cuda::swiglu));
  m.impl("swiglu_backward", TORCH_BOX(&moescale::cuda::swiglu_backward));
}
