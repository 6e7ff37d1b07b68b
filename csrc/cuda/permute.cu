#include "../include/cuda/permute.cuh"

#include "tensors.h"

namespace moescale::cuda {
namespace {

Tensor permute(Tensor x_TD, Tensor visit_R, Tensor row_TK) {
  const int64_t active = row_TK.size(1);
  check_rows(x_TD, "x_TD", x_TD.scalar_type(), visit_R);
  check_tensor(visit_R, "visit_R", ScalarType::Long, 1, x_TD);
  check_tensor(row_TK, "row_TK", ScalarType::Long, 2, x_TD);
  check_size(row_TK, "row_TK", 0, x_TD.size(0));
  check_count("active", active, 0, kMaxActive);
  check_count("tokens * active", x_TD.size(0) * active, 0, kMostRows);
  check_count("rows", visit_R.size(0), 0, kMostRows);
  const DeviceGuard guard(x_TD.get_device_index());

  const int64_t rows = visit_R.size(0);
  const int64_t width = x_TD.size(1);
  Tensor rows_RD = torch::stable::new_empty(x_TD, {rows, width});
  dispatch_dtype(x_TD, "x_TD", [&](auto type) {
    using T = typename decltype(type)::type;
    launch_permute(x_TD.const_data_ptr(), visit_R.const_data_ptr<int64_t>(), row_TK.const_data_ptr<int64_t>(),
                   rows_RD.mutable_data_ptr(), rows, x_TD.size(0), static_cast<int>(active), width * sizeof(T),
                   stream_of(x_TD));
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return rows_RD;
}

}  // namespace
}  // namespace moescale::cuda

STABLE_TORCH_LIBRARY_IMPL(moescale, CUDA, m) { m.impl("permute", TORCH_BOX(&moescale::cuda::permute)); }
