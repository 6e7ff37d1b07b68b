#include "../include/cuda/combine.cuh"

#include "tensors.h"

namespace moescale::cuda {
namespace {

Tensor combine(Tensor rows_RD, Tensor row_TK, std::optional<Tensor> weight_TK) {
  check_rows(rows_RD, "rows_RD", rows_RD.scalar_type(), row_TK);
  check_tensor(row_TK, "row_TK", ScalarType::Long, 2, rows_RD);
  const int64_t tokens = row_TK.size(0);
  const int64_t active = row_TK.size(1);
  check_count("active", active, 0, kMaxActive);
  check_count("rows", rows_RD.size(0), 0, kMostRows);
  if (weight_TK.has_value()) {
    check_tensor(*weight_TK, "weight_TK", ScalarType::Float, 2, rows_RD);
    check_size(*weight_TK, "weight_TK", 0, tokens);
    check_size(*weight_TK, "weight_TK", 1, active);
  }
  const DeviceGuard guard(rows_RD.get_device_index());

  const int64_t width = rows_RD.size(1);
  Tensor out_TD = torch::stable::new_empty(rows_RD, {tokens, width});
  dispatch_dtype(rows_RD, "rows_RD", [&](auto type) {
    using T = typename decltype(type)::type;
    launch_combine(static_cast<const T*>(elements<T>(rows_RD)), row_TK.const_data_ptr<int64_t>(),
                   data_or_null<float>(weight_TK), elements<T>(out_TD), rows_RD.size(0), tokens,
                   static_cast<int>(active), width, stream_of(rows_RD));
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out_TD;
}

std::tuple<Tensor, Tensor> combine_backward(Tensor grad_TD, Tensor rows_RD, Tensor visit_R, Tensor weight_TK) {
  check_rows(rows_RD, "rows_RD", rows_RD.scalar_type(), rows_RD);
  check_rows(grad_TD, "grad_TD", rows_RD.scalar_type(), rows_RD);
  check_tensor(visit_R, "visit_R", ScalarType::Long, 1, rows_RD);
  check_tensor(weight_TK, "weight_TK", ScalarType::Float, 2, rows_RD);
  const int64_t rows = rows_RD.size(0);
  const int64_t width = rows_RD.size(1);
  const int64_t tokens = weight_TK.size(0);
  const int64_t active = weight_TK.size(1);
  check_size(grad_TD, "grad_TD", 0, tokens);
  check_size(grad_TD, "grad_TD", 1, width);
  check_size(visit_R, "visit_R", 0, rows);
  check_count("active", active, 0, kMaxActive);
  check_count("tokens * active", tokens * active, 0, kMostRows);
  check_count("rows", rows, 0, kMostRows);
  const DeviceGuard guard(rows_RD.get_device_index());

  Tensor grad_rows_RD = torch::stable::new_empty(rows_RD, {rows, width});
  Tensor grad_weight_TK = torch::stable::new_zeros(weight_TK, {tokens, active});
  dispatch_dtype(rows_RD, "rows_RD", [&](auto type) {
    using T = typename decltype(type)::type;
    launch_combine_backward(static_cast<const T*>(elements<T>(grad_TD)), static_cast<const T*>(elements<T>(rows_RD)),
                            visit_R.const_data_ptr<int64_t>(), weight_TK.const_data_ptr<float>(),
                            elements<T>(grad_rows_RD), grad_weight_TK.mutable_data_ptr<float>(), rows, tokens,
                            static_cast<int>(active), width, stream_of(rows_RD));
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {grad_rows_RD, grad_weight_TK};
}

}  // namespace
}  // namespace moescale::cuda

STABLE_TORCH_LIBRARY_IMPL(moescale, CUDA, m) {
  m.impl("combine", TORCH_BOX(&moescale::cuda::combine));
  m.impl("combine_backward", TORCH_BOX(&moescale::cuda::combine_backward));
}
