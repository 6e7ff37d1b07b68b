#include "../include/cuda/assign.cuh"

#include "tensors.h"

namespace moescale::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> assign(Tensor index_TK, int64_t experts, int64_t multiple, int64_t limit) {
  check_tensor(index_TK, "index_TK", ScalarType::Long, 2, index_TK);
  check_count("experts", experts, 1, kMaxExperts);
  check_count("multiple", multiple, 1, kMostRows / experts);
  check_count("limit", limit, -1, kMostRows / experts);
  STD_TORCH_CHECK(limit < 0 || limit % multiple == 0, "limit (", limit, ") must be a multiple of multiple (", multiple,
                  ")");
  const int64_t visits = index_TK.numel();
  const int64_t rows = limit < 0 ? visits + experts * (multiple - 1) : experts * limit;
  check_count("visits", visits, 0, kMostRows);
  check_count("rows", rows, 0, kMostRows);
  const DeviceGuard guard(index_TK.get_device_index());

  Tensor counts_E = torch::stable::new_empty(index_TK, {experts});
  Tensor ends_E = torch::stable::new_empty(index_TK, {experts}, ScalarType::Int);
  Tensor visit_R = torch::stable::new_empty(index_TK, {rows});
  Tensor row_TK = torch::stable::new_empty(index_TK, {index_TK.size(0), index_TK.size(1)});
  Tensor scratch = torch::stable::new_empty(index_TK, {assign_scratch(visits, experts)}, ScalarType::Int);
  launch_assign(index_TK.const_data_ptr<int64_t>(), visits, static_cast<int>(experts), static_cast<int>(multiple),
                static_cast<int>(limit), scratch.mutable_data_ptr<int>(), counts_E.mutable_data_ptr<int64_t>(),
                ends_E.mutable_data_ptr<int>(), visit_R.mutable_data_ptr<int64_t>(),
                row_TK.mutable_data_ptr<int64_t>(), rows, stream_of(index_TK));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {counts_E, ends_E, visit_R, row_TK};
}

}  // namespace
}  // namespace moescale::cuda

STABLE_TORCH_LIBRARY_IMPL(moescale, CUDA, m) { m.impl("assign", TORCH_BOX(&moescale::cuda::assign)); }
