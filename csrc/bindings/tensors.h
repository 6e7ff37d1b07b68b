// What every binding needs of torch's stable ABI: checked pointers, and loops that are worth a thread.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>

#include "../include/cpu/kernels.h"

namespace moescale {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

template <class T>
constexpr ScalarType kScalarType = ScalarType::Undefined;
template <>
inline constexpr ScalarType kScalarType<float> = ScalarType::Float;
template <>
inline constexpr ScalarType kScalarType<double> = ScalarType::Double;
template <>
inline constexpr ScalarType kScalarType<Bf16> = ScalarType::BFloat16;
template <>
inline constexpr ScalarType kScalarType<int64_t> = ScalarType::Long;
template <>
inline constexpr ScalarType kScalarType<int32_t> = ScalarType::Int;
template <>
inline constexpr ScalarType kScalarType<bool> = ScalarType::Bool;

// The elements of a tensor that must be contiguous and of type T.
template <class T>
T* elements(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == kScalarType<T>, name, " has another element type than the kernel expects");
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
  return static_cast<T*>(tensor.data_ptr());
}

template <class T>
T* elements(const MaybeTensor& tensor, const char* name) {
  return tensor.has_value() ? elements<T>(*tensor, name) : nullptr;
}

// Calls `function` with a value of the element type of `tensor`: function(float{}), function(double{}) or
// function(Bf16{}).
template <class Function>
auto with_row_type(const Tensor& tensor, const char* name, const Function& function) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return function(float{});
    case ScalarType::Double: return function(double{});
    case ScalarType::BFloat16: return function(Bf16{});
    default: STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or float64 on a CPU");
  }
  return function(float{});
}

template <class Function>
auto with_score_type(const Tensor& tensor, const char* name, const Function& function) {
  if (tensor.scalar_type() == ScalarType::Double) return function(double{});
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float, name, " must be float32 or float64");
  return function(float{});
}

// Cuts `count` items, each of about `work` elements, among torch's threads; little work stays on the calling one.
template <class Function>
void for_each_range(int64_t count, int64_t work, const Function& function) {
  constexpr int64_t kWorthAThread = 1 << 14;
  if (count > 0) torch::stable::parallel_for(0, count, std::max<int64_t>(1, kWorthAThread / std::max<int64_t>(work, 1)), function);
}

}  // namespace moescale
