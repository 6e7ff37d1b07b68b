// combine: out[t] = sum over k of weight[t, k] * rows[row[t, k]], and its backward.
#pragma once

#include "common.cuh"

namespace moescale::cuda {

/// Visits whose packs a lane has in flight at once.
constexpr int kVisitsAtOnce = 4;

/// Blocks that share a multiprocessor: leaves 48 registers a thread. Left to itself, ptxas aims at 32 and spills.
constexpr int kCombineBlocks = 5;

/// One warp sums the rows of one token, in the order of k. Lane k keeps visit k's row and weight; a visit without a
/// row adds 0 x 0, which leaves a sum that began at +0 as it is.
template <typename T>
__global__ void __launch_bounds__(kThreads, kCombineBlocks)
    combine_kernel(const T* __restrict__ rows_RD, const int64_t* __restrict__ row_TK,
                   const float* __restrict__ weight_TK, T* __restrict__ out_TD, int64_t rows, int64_t tokens,
                   int active, int packs) {
  constexpr int kSize = Pack<T>::kSize;
  const int64_t token = row_of_warp();
  if (token >= tokens) return;
  const int lane = lane_index();
  const int64_t width = static_cast<int64_t>(packs) * kSize;

  int row = -1;
  float weight = 0.0f;
  if (lane < active) {
    const int64_t visit = token * active + lane;
    if (within(row_TK[visit], rows)) {
      row = static_cast<int>(row_TK[visit]);
      weight = weight_TK == nullptr ? 1.0f : weight_TK[visit];
    }
  }

  // Lanes beyond the last pack stay in the loop, because shuffles take the whole warp.
  for (int first = 0; first < packs; first += kWarp) {
    const int column = first + lane;
    float sum[kSize] = {};
#pragma unroll 1
    for (int k = 0; k < active; k += kVisitsAtOnce) {
      Pack<T> pack[kVisitsAtOnce];
      float factor[kVisitsAtOnce];
#pragma unroll
      for (int i = 0; i < kVisitsAtOnce; ++i) {
        const int from = __shfl_sync(kAllLanes, row, k + i);
        factor[i] = __shfl_sync(kAllLanes, weight, k + i);
        pack[i] = from >= 0 && column < packs ? load_pack(rows_RD + from * width, column) : zero_pack<T>();
      }
#pragma unroll
      for (int i = 0; i < kVisitsAtOnce; ++i) {
#pragma unroll
        for (int j = 0; j < kSize; ++j) sum[j] = fmaf(factor[i], to_float(pack[i].at[j]), sum[j]);
      }
    }
    if (column >= packs) continue;
    Pack<T> out;
#pragma unroll
    for (int j = 0; j < kSize; ++j) out.at[j] = round_to<T>(sum[j]);
    store_pack(out_TD + token * width, column, out);
  }
}

/// One warp takes one row: scales the token's gradient by the visit's weight, and sums its product with the row.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    combine_backward_kernel(const T* __restrict__ grad_TD, const T* __restrict__ rows_RD,
                            const int64_t* __restrict__ visit_R, const float* __restrict__ weight_TK,
                            T* __restrict__ grad_rows_RD, float* __restrict__ grad_weight_TK, int64_t rows,
                            int64_t visits, int active, int packs) {
  constexpr int kSize = Pack<T>::kSize;
  const int64_t row = row_of_warp();
  if (row >= rows) return;
  const int64_t width = static_cast<int64_t>(packs) * kSize;
  const int64_t visit = visit_R[row];
  if (!within(visit, visits)) {
    zero_row(grad_rows_RD + row * width, packs);
    return;
  }
  const T* const grad = grad_TD + static_cast<int64_t>(static_cast<uint32_t>(visit) / active) * width;
  const float weight = weight_TK[visit];
  float dot = 0.0f;
#pragma unroll 2
  for (int column = lane_index(); column < packs; column += kWarp) {
    const Pack<T> of_token = load_pack(grad, column);
    const Pack<T> of_row = load_pack(rows_RD + row * width, column);
    Pack<T> scaled;
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      const float value = to_float(of_token.at[j]);
      dot = fmaf(value, to_float(of_row.at[j]), dot);
      scaled.at[j] = round_to<T>(weight * value);
    }
    store_pack(grad_rows_RD + row * width, column, scaled);
  }
  dot = warp_sum(dot);
  if (lane_index() == 0) grad_weight_TK[visit] = dot;
}

/// `weight_TK` may be null: all weights are 1. rows fits 31 bits.
template <typename T>
void launch_combine(const T* rows_RD, const int64_t* row_TK, const float* weight_TK, T* out_TD, int64_t rows,
                    int64_t tokens, int active, int64_t width, cudaStream_t stream) {
  if (tokens == 0 || width == 0) return;
  MOESCALE_LAUNCH(combine_kernel<T>, blocks_for(tokens), kThreads, 0, stream, rows_RD, row_TK, weight_TK, out_TD, rows,
                  tokens, active, packs_of<T>(width));
}

/// `grad_weight_TK` arrives zeroed: visits without a row are not written. tokens * active fits 31 bits.
template <typename T>
void launch_combine_backward(const T* grad_TD, const T* rows_RD, const int64_t* visit_R, const float* weight_TK,
                             T* grad_rows_RD, float* grad_weight_TK, int64_t rows, int64_t tokens, int active,
                             int64_t width, cudaStream_t stream) {
  if (rows == 0 || width == 0) return;
  MOESCALE_LAUNCH(combine_backward_kernel<T>, blocks_for(rows), kThreads, 0, stream, grad_TD, rows_RD, visit_R,
                  weight_TK, grad_rows_RD, grad_weight_TK, rows, tokens * active, active, packs_of<T>(width));
}

}  // namespace moescale::cuda
