// permute: rows[r] = x[visit[r] / K], zeros where a row has no visit.
#pragma once

#include "common.cuh"

namespace moescale::cuda {

/// One warp copies one row. Bytes are bytes: the kernel is the same for every dtype.
static __global__ void __launch_bounds__(kThreads)
    permute_kernel(const uint4* __restrict__ x_TD, const int64_t* __restrict__ visit_R, uint4* __restrict__ rows_RD,
                   int64_t rows, int64_t visits, int active, int packs) {
  const int64_t row = row_of_warp();
  if (row >= rows) return;
  const int64_t visit = visit_R[row];
  uint4* const to = rows_RD + row * packs;
  if (!within(visit, visits)) {
#pragma unroll 1
    for (int column = lane_index(); column < packs; column += kWarp) to[column] = make_uint4(0, 0, 0, 0);
    return;
  }
  const uint4* const from = x_TD + static_cast<int64_t>(static_cast<uint32_t>(visit) / active) * packs;
#pragma unroll 4
  for (int column = lane_index(); column < packs; column += kWarp) to[column] = from[column];
}

/// `row_bytes` is a multiple of 16; tokens * active fits 31 bits.
static inline void launch_permute(const void* x_TD, const int64_t* visit_R, void* rows_RD, int64_t rows,
                                  int64_t tokens, int active, int64_t row_bytes, cudaStream_t stream) {
  if (rows == 0 || row_bytes == 0) return;
  MOESCALE_LAUNCH(permute_kernel, blocks_for(rows), kThreads, 0, stream, static_cast<const uint4*>(x_TD), visit_R,
                  static_cast<uint4*>(rows_RD), rows, tokens * active, active,
                  static_cast<int>(row_bytes / sizeof(uint4)));
}

}  // namespace moescale::cuda
