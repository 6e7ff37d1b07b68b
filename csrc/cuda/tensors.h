// What the launchers share: checks of tensors, the stream to launch on, and the choice of a kernel by dtype.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>

namespace moescale::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

constexpr int64_t kMostRows = std::numeric_limits<int32_t>::max();

/// Row widths are multiples of this, so that rows of every dtype are made of whole 16-byte packs.
constexpr int64_t kWidthMultiple = 8;

/// `tensor` is a contiguous CUDA tensor of this dtype and number of dimensions, on the device of `other`.
inline void check_tensor(const Tensor& tensor, const char* name, ScalarType dtype, int64_t dims, const Tensor& other) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == other.get_device_index(), name,
                  " must be on the CUDA device of the other arguments");
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, " has dtype ", torch::headeronly::toString(tensor.scalar_type()),
                  ", not ", torch::headeronly::toString(dtype));
  STD_TORCH_CHECK(tensor.dim() == dims, name, " has ", tensor.dim(), " dimensions, not ", dims);
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
}

inline void check_size(const Tensor& tensor, const char* name, int64_t dim, int64_t size) {
  STD_TORCH_CHECK(tensor.size(dim) == size, name, " has size ", tensor.size(dim), " in dimension ", dim, ", not ",
                  size);
}

/// `tensor` is a matrix whose rows kernels read and write 16 bytes at a time.
inline void check_rows(const Tensor& tensor, const char* name, ScalarType dtype, const Tensor& other) {
  check_tensor(tensor, name, dtype, 2, other);
  STD_TORCH_CHECK(tensor.size(1) % kWidthMultiple == 0, name, " has rows of ", tensor.size(1),
                  " elements; the width must be a multiple of ", kWidthMultiple);
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0, name,
                  " must start at a multiple of 16 bytes: copy the slice first");
}

inline void check_count(const char* name, int64_t value, int64_t least, int64_t most) {
  STD_TORCH_CHECK(value >= least && value <= most, name, " (", value, ") must be between ", least, " and ", most);
}

/// The data of an optional tensor, or null.
template <typename T>
const T* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr<T>() : nullptr;
}

/// The stream that torch launches on, on the device of `tensor`.
inline cudaStream_t stream_of(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

template <typename T>
struct Type {
  using type = T;
};

/// Calls `run` with the Type of the elements of `tensor`, as CUDA names it.
template <typename Run>
void dispatch_dtype(const Tensor& tensor, const char* name, Run run) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return run(Type<float>());
    case ScalarType::Half: return run(Type<__half>());
    case ScalarType::BFloat16: return run(Type<__nv_bfloat16>());
    default: break;
  }
  STD_TORCH_CHECK(false, name, " has dtype ", torch::headeronly::toString(tensor.scalar_type()),
                  "; on CUDA it may be float32, float16 or bfloat16");
}

/// The tensor's elements, as CUDA names them.
template <typename T>
T* elements(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

}  // namespace moescale::cuda
