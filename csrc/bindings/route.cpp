#include <tuple>

#include "tensors.h"

namespace moescale {

namespace {

RouteShape shape_of(const Tensor& logits_TE, int64_t sequences, bool batch_first, int64_t active, bool sigmoid,
                    bool normalized, double scale) {
  STD_TORCH_CHECK(sequences >= 0 && (sequences == 0 ? logits_TE.size(0) == 0 : logits_TE.size(0) % sequences == 0),
                  "the tokens must be a multiple of the sequences");
  RouteShape shape{};
  shape.experts = logits_TE.size(1);
  shape.active = active;
  shape.length = sequences == 0 ? 0 : logits_TE.size(0) / sequences;
  shape.sequence_stride = batch_first ? shape.length : 1;
  shape.token_stride = batch_first ? 1 : sequences;
  shape.sigmoid = sigmoid;
  shape.normalized = normalized;
  shape.scale = scale;
  return shape;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> route(
    const Tensor& logits_TE, const MaybeTensor& bias_E, const MaybeTensor& allowed_TE, const MaybeTensor& mask_T,
    int64_t sequences, bool batch_first, int64_t active, bool sigmoid, bool normalized, double scale) {
  const RouteShape shape = shape_of(logits_TE, sequences, batch_first, active, sigmoid, normalized, scale);
  const int64_t tokens = logits_TE.size(0);
  const auto make = [&](std::initializer_list<int64_t> sizes) { return torch::stable::new_empty(logits_TE, sizes); };
  Tensor weight_TK = make({tokens, active});
  Tensor index_TK = torch::stable::new_empty(logits_TE, {tokens, active}, ScalarType::Long);
  Tensor logsumexp_T = make({tokens}), entropy_T = make({tokens});
  Tensor scored_BE = make({sequences, shape.experts}), visits_BE = make({sequences, shape.experts});
  with_score_type(logits_TE, "logits_TE", [&](auto type) {
    using T = decltype(type);
    const T *logits = elements<T>(logits_TE, "logits_TE"), *bias = elements<T>(bias_E, "bias_E");
    const bool *allowed = elements<bool>(allowed_TE, "allowed_TE"), *mask = elements<bool>(mask_T, "mask_T");
    const RouteOutputs<T> out{elements<T>(weight_TK, "weight_TK"),     elements<int64_t>(index_TK, "index_TK"),
                              elements<T>(logsumexp_T, "logsumexp_T"), elements<T>(scored_BE, "scored_BE"),
                              elements<T>(visits_BE, "visits_BE"),     elements<T>(entropy_T, "entropy_T")};
    for_each_range(sequences, shape.length * shape.experts, [&](int64_t begin, int64_t end) {
      route_kernels<T>().route(logits, bias, allowed, mask, shape, out, begin, end);
    });
  });
  return {weight_TK, index_TK, logsumexp_T, scored_BE, visits_BE, entropy_T};
}

Tensor route_backward(const Tensor& grad_weight_TK, const Tensor& grad_logsumexp_T, const Tensor& grad_scored_BE,
                      const Tensor& logits_TE, const Tensor& index_TK, const Tensor& logsumexp_T,
                      const MaybeTensor& mask_T, bool batch_first, bool sigmoid, bool normalized, double scale) {
  const int64_t sequences = grad_scored_BE.size(0);
  const RouteShape shape = shape_of(logits_TE, sequences, batch_first, index_TK.size(1), sigmoid, normalized, scale);
  Tensor grad_logits_TE = torch::stable::new_empty(logits_TE, {logits_TE.size(0), shape.experts});
  with_score_type(logits_TE, "logits_TE", [&](auto type) {
    using T = decltype(type);
    const RouteGradients<T> grad{elements<T>(grad_weight_TK, "grad_weight_TK"),
                                 elements<T>(grad_logsumexp_T, "grad_logsumexp_T"),
                                 elements<T>(grad_scored_BE, "grad_scored_BE")};
    const T* logits = elements<T>(logits_TE, "logits_TE");
    const int64_t* index = elements<int64_t>(index_TK, "index_TK");
    const bool* mask = elements<bool>(mask_T, "mask_T");
    T* out = elements<T>(grad_logits_TE, "grad_logits_TE");
    for_each_range(sequences, shape.length * shape.experts, [&](int64_t begin, int64_t end) {
      route_kernels<T>().route_backward(grad, logits, index, mask, shape, out, begin, end);
    });
  });
  return grad_logits_TE;
}

}  // namespace moescale

STABLE_TORCH_LIBRARY_IMPL(moescale, CPU, library) {
  library.impl("route", TORCH_BOX(&moescale::route));
  library.impl("route_backward", TORCH_BOX(&moescale::route_backward));
}
