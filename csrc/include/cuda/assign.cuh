// assign: rows ordered by expert, within an expert by visit, without a sort and without reading anything back.
//
// The visits are cut into chunks, in order, one block each:
//   count_visits   how many visits of each chunk go to each expert; fills visit_R with -1
//   scan_chunks    for each expert: visits in all chunks before, and in total
//   scan_experts   rows of each expert, and where they end
//   place_visits   a visit's row: where its expert begins + visits before its chunk + visits before it in the chunk
// Integer sums in any order agree, so shared counters may be atomic; every row is decided by prefix sums.
#pragma once

#include "common.cuh"

namespace moescale::cuda {

constexpr int64_t kVisitsPerChunk = 1024;
constexpr int64_t kMaxChunks = 1024;
constexpr int kScanWarps = 32;

/// How the visits are cut: every warp of a block has `per_warp` consecutive visits of the block's chunk.
struct Chunks {
  int64_t visits;
  int64_t per_warp;
  int count;
  int experts;
};

/// Chunks of at least kVisitsPerChunk visits, and at most kMaxChunks of them.
inline Chunks cut_into_chunks(int64_t visits, int experts) {
  const int64_t least = ceil_div(visits, kMaxChunks);
  const int64_t per_warp = ceil_div<int64_t>(least > kVisitsPerChunk ? least : kVisitsPerChunk, kThreads) * kWarp;
  const int64_t count = ceil_div(visits, per_warp * kWarpsPerBlock);
  return {visits, per_warp, static_cast<int>(count > 0 ? count : 1), experts};
}

__device__ __forceinline__ int64_t first_visit_of_warp(const Chunks& chunks) {
  return row_of_warp() * chunks.per_warp;
}

/// The expert of a visit, or -1 where the visit does not exist or its expert does not.
__device__ __forceinline__ int expert_of(const int64_t* index_TK, int64_t visit, const Chunks& chunks) {
  if (visit >= chunks.visits) return -1;
  const int64_t expert = index_TK[visit];
  return within(expert, chunks.experts) ? static_cast<int>(expert) : -1;
}

/// Adds the visits of each warp to counters[warp * warp_stride + expert] in shared memory.
__device__ __forceinline__ void count_into(int* counters, int warp_stride, const int64_t* index_TK,
                                           const Chunks& chunks) {
  const int64_t first = first_visit_of_warp(chunks);
  for (int64_t i = lane_index(); i < chunks.per_warp; i += kWarp) {
    const int expert = expert_of(index_TK, first + i, chunks);
    if (expert >= 0) atomicAdd(counters + warp_index() * warp_stride + expert, 1);
  }
}

/// One block counts one chunk: `count_CE`, C chunks.
static __global__ void __launch_bounds__(kThreads)
    count_visits_kernel(const int64_t* __restrict__ index_TK, Chunks chunks, int* __restrict__ count_CE,
                        int64_t* __restrict__ visit_R, int64_t rows) {
  int* const counters = reinterpret_cast<int*>(shared_memory());  // [E]
  for (int expert = threadIdx.x; expert < chunks.experts; expert += kThreads) counters[expert] = 0;
  __syncthreads();
  count_into(counters, 0, index_TK, chunks);
  __syncthreads();
  for (int expert = threadIdx.x; expert < chunks.experts; expert += kThreads) {
    count_CE[static_cast<int64_t>(blockIdx.x) * chunks.experts + expert] = counters[expert];
  }
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; row < rows; row += step) {
    visit_R[row] = -1;
  }
}

/// One block scans 32 experts, a lane each; a warp takes consecutive chunks. Replaces each count by the sum over the
/// chunks before, and writes `visits_E`.
static __global__ void __launch_bounds__(kScanWarps * kWarp)
    scan_chunks_kernel(int* __restrict__ count_CE, int* __restrict__ visits_E, Chunks chunks) {
  int* const sum_of_warp = reinterpret_cast<int*>(shared_memory());  // [warps, 32]
  const int expert = static_cast<int>(blockIdx.x) * kWarp + lane_index();
  const bool exists = expert < chunks.experts;
  const int share = ceil_div(chunks.count, kScanWarps);
  const int first = warp_index() * share;
  const int last = min(first + share, chunks.count);

  int sum = 0;
  for (int chunk = first; exists && chunk < last; ++chunk) {
    sum += count_CE[static_cast<int64_t>(chunk) * chunks.experts + expert];
  }
  sum_of_warp[threadIdx.x] = sum;
  __syncthreads();
  if (!exists) return;

  int before = 0;
  for (int warp = 0; warp < warp_index(); ++warp) before += sum_of_warp[warp * kWarp + lane_index()];
  for (int chunk = first; chunk < last; ++chunk) {
    int& cell = count_CE[static_cast<int64_t>(chunk) * chunks.experts + expert];
    const int count = cell;
    cell = before;
    before += count;
  }
  if (warp_index() == kScanWarps - 1) visits_E[expert] = before;
}

/// One block of kMaxExperts threads, one for each expert. `limit` < 0: visits rounded up to `multiple`; otherwise
/// `limit` rows for every expert.
static __global__ void __launch_bounds__(kMaxExperts)
    scan_experts_kernel(const int* __restrict__ visits_E, int64_t* __restrict__ counts_E, int* __restrict__ ends_E,
                        int experts, int multiple, int limit) {
  int* const end_of_warp = reinterpret_cast<int*>(shared_memory());  // [32]
  const int expert = threadIdx.x;
  int rows = 0;
  if (expert < experts) rows = limit >= 0 ? limit : ceil_div(visits_E[expert], multiple) * multiple;
  const int end = warp_prefix_sum(rows);
  if (lane_index() == kWarp - 1) end_of_warp[warp_index()] = end;
  __syncthreads();
  if (warp_index() == 0) {
    const int prefix = warp_prefix_sum(end_of_warp[lane_index()]);
    end_of_warp[lane_index()] = prefix;
  }
  __syncthreads();
  if (expert >= experts) return;
  counts_E[expert] = rows;
  ends_E[expert] = end + (warp_index() > 0 ? end_of_warp[warp_index() - 1] : 0);
}

/// Where the next visit of each expert goes, for each warp: `next[warp, expert]` counts the visits of the expert
/// before the warp's first, over all chunks.
__device__ __forceinline__ void begin_of_warps(int* next, const int64_t* index_TK, const int* before_CE,
                                               const Chunks& chunks) {
  for (int i = threadIdx.x; i < kWarpsPerBlock * chunks.experts; i += kThreads) next[i] = 0;
  __syncthreads();
  count_into(next, chunks.experts, index_TK, chunks);
  __syncthreads();
  for (int expert = threadIdx.x; expert < chunks.experts; expert += kThreads) {
    int before = before_CE[static_cast<int64_t>(blockIdx.x) * chunks.experts + expert];
    for (int warp = 0; warp < kWarpsPerBlock; ++warp) {
      int& cell = next[warp * chunks.experts + expert];
      const int count = cell;
      cell = before;
      before += count;
    }
  }
  __syncthreads();
}

/// One block places one chunk. Each warp walks its visits in order, 32 at a time: lanes of the same expert find each
/// other, are numbered by lane, and the lowest moves the warp's counter on.
static __global__ void __launch_bounds__(kThreads)
    place_visits_kernel(const int64_t* __restrict__ index_TK, const int* __restrict__ before_CE,
                        const int64_t* __restrict__ counts_E, const int* __restrict__ ends_E,
                        int64_t* __restrict__ visit_R, int64_t* __restrict__ row_TK, Chunks chunks, int limit) {
  int* const next = reinterpret_cast<int*>(shared_memory());  // [warps, E]
  begin_of_warps(next, index_TK, before_CE, chunks);

  int* const next_of_warp = next + warp_index() * chunks.experts;
  const int64_t first = first_visit_of_warp(chunks);
  const unsigned lanes_before = (1u << lane_index()) - 1;
  for (int64_t i = 0; i < chunks.per_warp && first + i < chunks.visits; i += kWarp) {
    const int64_t visit = first + i + lane_index();
    const int expert = expert_of(index_TK, visit, chunks);
    const unsigned same = __match_any_sync(kAllLanes, expert);
    const int place = expert < 0 ? 0 : next_of_warp[expert] + __popc(same & lanes_before);
    __syncwarp();
    if (expert >= 0 && (same & lanes_before) == 0) next_of_warp[expert] += __popc(same);
    __syncwarp();
    if (visit >= chunks.visits) continue;
    const bool served = expert >= 0 && (limit < 0 || place < limit);
    const int64_t row = served ? ends_E[expert] - counts_E[expert] + place : -1;
    row_TK[visit] = row;
    if (served) visit_R[row] = visit;
  }
}

/// Integers of scratch memory that launch_assign needs.
inline int64_t assign_scratch(int64_t visits, int experts) {
  return static_cast<int64_t>(cut_into_chunks(visits, experts).count + 1) * experts;
}

/// `scratch` holds assign_scratch integers; `rows` is the length of visit_R and fits 31 bits; experts <= kMaxExperts.
static inline void launch_assign(const int64_t* index_TK, int64_t visits, int experts, int multiple, int limit,
                                 int* scratch, int64_t* counts_E, int* ends_E, int64_t* visit_R, int64_t* row_TK,
                                 int64_t rows, cudaStream_t stream) {
  const Chunks chunks = cut_into_chunks(visits, experts);
  int* const visits_E = scratch;
  int* const count_CE = scratch + experts;
  const size_t shared_E = experts * sizeof(int);
  MOESCALE_LAUNCH(count_visits_kernel, chunks.count, kThreads, shared_E, stream, index_TK, chunks, count_CE, visit_R,
                  rows);
  MOESCALE_LAUNCH(scan_chunks_kernel, ceil_div(experts, kWarp), kScanWarps * kWarp,
                  kScanWarps * kWarp * sizeof(int), stream, count_CE,
                  visits_E, chunks);
  MOESCALE_LAUNCH(scan_experts_kernel, 1, kMaxExperts, kWarp * sizeof(int), stream, visits_E, counts_E, ends_E,
                  experts, multiple, limit);
  MOESCALE_LAUNCH(place_visits_kernel, chunks.count, kThreads, kWarpsPerBlock * shared_E, stream, index_TK, count_CE,
                  counts_E, ends_E, visit_R, row_TK, chunks, limit);
}

}  // namespace moescale::cuda
