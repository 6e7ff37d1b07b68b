// permute: rows[r] = x[visit[r] / K], zeros where a row has no visit.
#pragma once

#include "common.cuh"

namespace moescale::cuda {

/// Packs of a token that a lane has in flight at once.
constexpr int kPacksAtOnce = 4;

/// One warp takes one token: it reads the row once, however many experts it goes to, and writes it for each of them. By
/// row it would be read K times, and from memory, since the experts of a token lie further apart than a cache is large.
/// Lane k keeps the row of visit k.
__device__ __forceinline__ void copy_token(const uint4* __restrict__ x_TD, const int64_t* __restrict__ row_TK,
                                           uint4* __restrict__ rows_RD, int64_t rows, int64_t token, int active,
                                           int packs) {
  const int lane = lane_index();
  int row = -1;
  if (lane < active) {
    const int64_t found = row_TK[token * active + lane];
    if (within(found, rows)) row = static_cast<int>(found);
  }
  const uint4* const from = x_TD + token * packs;
  // Lanes beyond the last pack stay in the loop, because shuffles take the whole warp.
  for (int first = 0; first < packs; first += kPacksAtOnce * kWarp) {
    uint4 pack[kPacksAtOnce];
#pragma unroll
    for (int i = 0; i < kPacksAtOnce; ++i) {
      const int column = first + i * kWarp + lane;
      pack[i] = column < packs ? from[column] : make_uint4(0, 0, 0, 0);
    }
#pragma unroll 1
    for (int k = 0; k < active; ++k) {
      const int to = __shfl_sync(kAllLanes, row, k);
      if (to < 0) continue;
      uint4* const target = rows_RD + static_cast<int64_t>(to) * packs;
#pragma unroll
      for (int i = 0; i < kPacksAtOnce; ++i) {
        const int column = first + i * kWarp + lane;
        if (column < packs) target[column] = pack[i];
      }
    }
  }
}

/// One warp takes kWarp rows and zeros those that no visit has.
__device__ __forceinline__ void zero_unvisited(const int64_t* __restrict__ visit_R, uint4* __restrict__ rows_RD,
                                               int64_t rows, int64_t first, int64_t visits, int packs) {
  const int64_t mine = first + lane_index();
  const int empty = mine < rows && !within(visit_R[mine], visits);
#pragma unroll 1
  for (int i = 0; i < kWarp; ++i) {
    if (__shfl_sync(kAllLanes, empty, i) == 0) continue;
    uint4* const row = rows_RD + (first + i) * packs;
#pragma unroll 1
    for (int column = lane_index(); column < packs; column += kWarp) row[column] = make_uint4(0, 0, 0, 0);
  }
}

/// The first `token_blocks` blocks copy tokens, the others look for rows without one. Bytes are bytes: the kernel is
/// the same for every dtype.
static __global__ void __launch_bounds__(kThreads)
    permute_kernel(const uint4* __restrict__ x_TD, const int64_t* __restrict__ visit_R,
                   const int64_t* __restrict__ row_TK, uint4* __restrict__ rows_RD, int64_t rows, int64_t tokens,
                   unsigned token_blocks, int active, int packs) {
  if (blockIdx.x < token_blocks) {
    const int64_t token = row_of_warp();
    if (token < tokens) copy_token(x_TD, row_TK, rows_RD, rows, token, active, packs);
  } else {
    const int64_t first = (row_of_warp() - static_cast<int64_t>(token_blocks) * kWarpsPerBlock) * kWarp;
    if (first < rows) zero_unvisited(visit_R, rows_RD, rows, first, tokens * active, packs);
  }
}

/// `visit_R` and `row_TK` say the same. `row_bytes` is a multiple of 16; tokens * active and rows fit 31 bits.
static inline void launch_permute(const void* x_TD, const int64_t* visit_R, const int64_t* row_TK, void* rows_RD,
                                  int64_t rows, int64_t tokens, int active, int64_t row_bytes, cudaStream_t stream) {
  if (rows == 0 || row_bytes == 0) return;
  const unsigned token_blocks = active == 0 ? 0 : blocks_for(tokens);
  MOESCALE_LAUNCH(permute_kernel, token_blocks + blocks_for(ceil_div<int64_t>(rows, kWarp)), kThreads, 0, stream,
                  static_cast<const uint4*>(x_TD), visit_R, row_TK, static_cast<uint4*>(rows_RD), rows, tokens,
                  token_blocks, active, static_cast<int>(row_bytes / sizeof(uint4)));
}

}  // namespace moescale::cuda
