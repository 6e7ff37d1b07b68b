#include "../include/cuda/route_backward.cuh"

#include "tensors.h"

namespace moescale::cuda {
namespace {

RouteShape shape_of(const Tensor& logits_TE, int64_t sequences, bool batch_first, int64_t active) {
  check_tensor(logits_TE, "logits_TE", ScalarType::Float, 2, logits_TE);
  const int64_t tokens = logits_TE.size(0);
  const int64_t experts = logits_TE.size(1);
  check_count("experts", experts, 1, kMaxExperts);
  check_count("active", active, 0, experts < kMaxActive ? experts : kMaxActive);
  check_count("sequences", sequences, 1, kMostRows / kMaxExperts);
  check_count("tokens", tokens, 0, kMostRows);
  STD_TORCH_CHECK(!batch_first || tokens % sequences == 0, "tokens (", tokens, ") must be a multiple of sequences (",
                  sequences, ") when the batch comes first");
  return {tokens, static_cast<int>(sequences), batch_first, static_cast<int>(experts), static_cast<int>(active)};
}

void check_mask(const std::optional<Tensor>& mask_T, const Tensor& logits_TE) {
  if (!mask_T.has_value()) return;
  check_tensor(*mask_T, "mask_T", ScalarType::Bool, 1, logits_TE);
  check_size(*mask_T, "mask_T", 0, logits_TE.size(0));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> route(
    Tensor logits_TE, std::optional<Tensor> bias_E, std::optional<Tensor> allowed_TE, std::optional<Tensor> mask_T,
    int64_t sequences, bool batch_first, int64_t active, bool sigmoid, bool normalized, double scale) {
  const RouteShape shape = shape_of(logits_TE, sequences, batch_first, active);
  check_mask(mask_T, logits_TE);
  if (bias_E.has_value()) {
    check_tensor(*bias_E, "bias_E", ScalarType::Float, 1, logits_TE);
    check_size(*bias_E, "bias_E", 0, shape.experts);
  }
  if (allowed_TE.has_value()) {
    check_tensor(*allowed_TE, "allowed_TE", ScalarType::Bool, 2, logits_TE);
    check_size(*allowed_TE, "allowed_TE", 0, shape.tokens);
    check_size(*allowed_TE, "allowed_TE", 1, shape.experts);
  }
  const int per_sequence = route_shares(shape);
  const int64_t shares = sequences * per_sequence;
  check_count("blocks", shares, 1, kMostRows);
  const DeviceGuard guard(logits_TE.get_device_index());

  Tensor weight_TK = torch::stable::new_empty(logits_TE, {shape.tokens, active});
  Tensor index_TK = torch::stable::new_empty(logits_TE, {shape.tokens, active}, ScalarType::Long);
  Tensor logsumexp_T = torch::stable::new_empty(logits_TE, {shape.tokens});
  Tensor entropy_T = torch::stable::new_empty(logits_TE, {shape.tokens});
  Tensor scored_BE = torch::stable::new_empty(logits_TE, {sequences, shape.experts});
  Tensor visits_BE = torch::stable::new_empty(logits_TE, {sequences, shape.experts});
  Tensor scored_BCE = torch::stable::new_empty(logits_TE, {shares, shape.experts});
  Tensor visits_BCE = torch::stable::new_empty(logits_TE, {shares, shape.experts}, ScalarType::Int);
  launch_route({logits_TE.const_data_ptr<float>(), data_or_null<float>(bias_E), data_or_null<bool>(allowed_TE),
                data_or_null<bool>(mask_T)},
               shape, {sigmoid, normalized, static_cast<float>(scale)},
               {weight_TK.mutable_data_ptr<float>(), index_TK.mutable_data_ptr<int64_t>(),
                logsumexp_T.mutable_data_ptr<float>(), entropy_T.mutable_data_ptr<float>()},
               {scored_BCE.mutable_data_ptr<float>(), visits_BCE.mutable_data_ptr<int>(), per_sequence},
               scored_BE.mutable_data_ptr<float>(), visits_BE.mutable_data_ptr<float>(), stream_of(logits_TE));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {weight_TK, index_TK, logsumexp_T, scored_BE, visits_BE, entropy_T};
}

Tensor route_backward(Tensor grad_weight_TK, Tensor grad_logsumexp_T, Tensor grad_scored_BE, Tensor logits_TE,
                      Tensor index_TK, Tensor logsumexp_T, std::optional<Tensor> mask_T, bool batch_first,
                      bool sigmoid, bool normalized, double scale) {
  check_tensor(grad_scored_BE, "grad_scored_BE", ScalarType::Float, 2, logits_TE);
  check_tensor(index_TK, "index_TK", ScalarType::Long, 2, logits_TE);
  const RouteShape shape = shape_of(logits_TE, grad_scored_BE.size(0), batch_first, index_TK.size(1));
  check_size(grad_scored_BE, "grad_scored_BE", 1, shape.experts);
  check_size(index_TK, "index_TK", 0, shape.tokens);
  check_tensor(grad_weight_TK, "grad_weight_TK", ScalarType::Float, 2, logits_TE);
  check_size(grad_weight_TK, "grad_weight_TK", 0, shape.tokens);
  check_size(grad_weight_TK, "grad_weight_TK", 1, shape.active);
  check_tensor(grad_logsumexp_T, "grad_logsumexp_T", ScalarType::Float, 1, logits_TE);
  check_size(grad_logsumexp_T, "grad_logsumexp_T", 0, shape.tokens);
  check_tensor(logsumexp_T, "logsumexp_T", ScalarType::Float, 1, logits_TE);
  check_size(logsumexp_T, "logsumexp_T", 0, shape.tokens);
  check_mask(mask_T, logits_TE);
  const DeviceGuard guard(logits_TE.get_device_index());

  Tensor grad_logits_TE = torch::stable::new_empty(logits_TE, {shape.tokens, shape.experts});
  launch_route_backward(
      {grad_weight_TK.const_data_ptr<float>(), grad_logsumexp_T.const_data_ptr<float>(),
       grad_scored_BE.const_data_ptr<float>()},
      {logits_TE.const_data_ptr<float>(), index_TK.const_data_ptr<int64_t>(), logsumexp_T.const_data_ptr<float>(),
       data_or_null<bool>(mask_T)},
      shape, {sigmoid, normalized, static_cast<float>(scale)}, grad_logits_TE.mutable_data_ptr<float>(),
      stream_of(logits_TE));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return grad_logits_TE;
}

}  // namespace
}  // namespace moescale::cuda

STABLE_TORCH_LIBRARY_IMPL(moescale, CUDA, m) {
  m.impl("route", TORCH_BOX(&moescale::cuda::route));
  m.impl("route_backward", TORCH_BOX(&moescale::cuda::route_backward));
}
