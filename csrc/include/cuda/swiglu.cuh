// swiglu: act = silu(gate) * up, optionally times the weight of the row's visit, and its backward.
//
// A row of gate_up holds F gates, then F ups. With weights, rows without a visit are written as zeros and never read:
// behind the last expert's rows a grouped matrix product leaves memory as it found it.
#pragma once

#include "common.cuh"

namespace moescale::cuda {

__device__ __forceinline__ float sigmoid(float value) { return 1.0f / (1.0f + expf(-value)); }

/// Weights by visit; `visit_R` is null where rows are not weighted. `weight_TK` is null without any visit, too.
struct RowWeights {
  const float* weight_TK;
  const int64_t* visit_R;
  int64_t visits;
};

/// The visit of a row, or -1; 0 for every row that is not weighted.
__device__ __forceinline__ int64_t visit_of(const RowWeights& weights, int64_t row) {
  if (weights.visit_R == nullptr) return 0;
  const int64_t visit = weights.visit_R[row];
  return within(visit, weights.visits) ? visit : -1;
}

__device__ __forceinline__ float weight_of(const RowWeights& weights, int64_t visit) {
  return weights.visit_R == nullptr ? 1.0f : weights.weight_TK[visit];
}

/// One warp takes one row.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    swiglu_kernel(const T* __restrict__ gate_up_R2F, RowWeights weights, T* __restrict__ act_RF, int64_t rows,
                  int packs) {
  constexpr int kSize = Pack<T>::kSize;
  const int64_t row = row_of_warp();
  if (row >= rows) return;
  const int64_t width = static_cast<int64_t>(packs) * kSize;
  T* const act = act_RF + row * width;
  const int64_t visit = visit_of(weights, row);
  if (visit < 0) {
    zero_row(act, packs);
    return;
  }
  const T* const gate_up = gate_up_R2F + row * 2 * width;
  const float weight = weight_of(weights, visit);
#pragma unroll 2
  for (int column = lane_index(); column < packs; column += kWarp) {
    const Pack<T> gate = load_pack(gate_up, column);
    const Pack<T> up = load_pack(gate_up, packs + column);
    Pack<T> out;
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      const float g = to_float(gate.at[j]);
      out.at[j] = round_to<T>(g * sigmoid(g) * to_float(up.at[j]) * weight);
    }
    store_pack(act, column, out);
  }
}

/// One warp takes one row; `act_RF` holds the gradient and is overwritten with what swiglu_kernel returns.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    swiglu_backward_kernel(T* __restrict__ act_RF, const T* __restrict__ gate_up_R2F, RowWeights weights,
                           T* __restrict__ grad_gate_up_R2F, float* __restrict__ grad_weight_TK, int64_t rows,
                           int packs) {
  constexpr int kSize = Pack<T>::kSize;
  const int64_t row = row_of_warp();
  if (row >= rows) return;
  const int64_t width = static_cast<int64_t>(packs) * kSize;
  T* const act = act_RF + row * width;
  T* const grad_gate_up = grad_gate_up_R2F + row * 2 * width;
  const int64_t visit = visit_of(weights, row);
  if (visit < 0) {
    zero_row(act, packs);
    zero_row(grad_gate_up, 2 * packs);
    return;
  }
  const T* const gate_up = gate_up_R2F + row * 2 * width;
  const float weight = weight_of(weights, visit);
  float dot = 0.0f;
  for (int column = lane_index(); column < packs; column += kWarp) {
    const Pack<T> grad = load_pack(act, column);
    const Pack<T> gate = load_pack(gate_up, column);
    const Pack<T> up = load_pack(gate_up, packs + column);
    Pack<T> out;
    Pack<T> grad_gate;
    Pack<T> grad_up;
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      const float g = to_float(gate.at[j]);
      const float u = to_float(up.at[j]);
      const float incoming = to_float(grad.at[j]);
      const float s = sigmoid(g);
      const float silu = g * s;
      const float weighted = incoming * weight;
      dot = fmaf(incoming, silu * u, dot);
      out.at[j] = round_to<T>(silu * u * weight);
      grad_up.at[j] = round_to<T>(weighted * silu);
      grad_gate.at[j] = round_to<T>(weighted * u * s * (1.0f + g * (1.0f - s)));
    }
    store_pack(act, column, out);
    store_pack(grad_gate_up, column, grad_gate);
    store_pack(grad_gate_up, packs + column, grad_up);
  }
  if (weights.visit_R == nullptr) return;
  dot = warp_sum(dot);
  if (lane_index() == 0) grad_weight_TK[visit] = dot;
}

template <typename T>
void launch_swiglu(const T* gate_up_R2F, RowWeights weights, T* act_RF, int64_t rows, int64_t width,
                   cudaStream_t stream) {
  if (rows == 0 || width == 0) return;
  MOESCALE_LAUNCH(swiglu_kernel<T>, blocks_for(rows), kThreads, 0, stream, gate_up_R2F, weights, act_RF, rows,
                  packs_of<T>(width));
}

/// `grad_weight_TK` arrives zeroed (visits without a row are not written) and may be null without weights.
template <typename T>
void launch_swiglu_backward(T* grad_act_RF, const T* gate_up_R2F, RowWeights weights, T* grad_gate_up_R2F,
                            float* grad_weight_TK, int64_t rows, int64_t width, cudaStream_t stream) {
  if (rows == 0 || width == 0) return;
  MOESCALE_LAUNCH(swiglu_backward_kernel<T>, blocks_for(rows), kThreads, 0, stream, grad_act_RF, gate_up_R2F, weights,
                  grad_gate_up_R2F, grad_weight_TK, rows, packs_of<T>(width));
}

}  // namespace moescale::cuda
