// Small kernels that are right with fault=0 and wrong in one way each with another: `faults FOLDER fault=N seed=N`.
// They show that the emulator and the sanitizers see what they are there to see.
#include "arguments.h"
#include "common.cuh"

namespace moescale::cuda {
namespace {

enum Fault {
  kNone,
  kMissingBarrier,
  kMissingSyncwarp,
  kDivergentBarrier,
  kBarrierAfterExit,
  kBarriersOnTwoLines,
  kMaskWithoutCaller,
  kMaskOfAbsentLane,
  kDifferentMasks,
  kDifferentFunctions,
  kLaneOutsideMask,
  kOutOfBoundsGlobal,
  kOutOfBoundsShared,
  kRaceInBlock,
  kRaceOfBlocks,
  kUninitialisedShared,
};

constexpr int kBlocks = 2;
constexpr int kBlockThreads = 64;

/// Reverses each block's 64 numbers through shared memory, then adds to each the sum of its warp.
__global__ void reverse_and_add(const int* in, int* out, int* flag, int fault) {
  int* const shared = reinterpret_cast<int*>(shared_memory());  // [64]
  const int thread = threadIdx.x;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kBlockThreads;
  if (fault == kDivergentBarrier && thread < 40) __syncthreads();
  if (fault == kBarrierAfterExit && thread >= 32) return;
  if (fault == kBarriersOnTwoLines) {
    if (thread < 32) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  }
  if (fault != kUninitialisedShared || thread != 5) shared[thread] = in[first + thread];
  if (fault == kOutOfBoundsShared && thread == 63) shared[thread + 1] = 0;
  if (fault != kMissingBarrier) __syncthreads();
  const int value = shared[kBlockThreads - 1 - thread];
  __syncthreads();

  // The sum of a warp through shared memory: its lanes only need each other.
  shared[thread] = value;
  if (fault != kMissingSyncwarp) __syncwarp();
  int sum = 0;
  for (int lane = 0; lane < kWarp; ++lane) sum += shared[warp_index() * kWarp + lane];
  unsigned mask = kAllLanes;
  if (fault == kMaskWithoutCaller && thread == 7) mask = ~(1u << 7);
  if (fault == kMaskOfAbsentLane && thread == 7) return;
  if (fault == kDifferentMasks && thread % kWarp < 16) mask = 0x1ffff;
  if (fault == kDifferentFunctions && thread == 7) sum += __shfl_xor_sync(mask, sum, 1);
  if (fault == kLaneOutsideMask) mask = thread % kWarp < 16 ? 0xffffu : 0xffff0000u;
  const int agreed = __shfl_sync(mask, sum, 0);

  if (fault == kRaceInBlock || thread == 0) flag[blockIdx.x] = static_cast<int>(first);
  if (fault == kRaceOfBlocks && thread == 0) flag[0] = agreed;
  const int64_t beyond = fault == kOutOfBoundsGlobal && blockIdx.x == kBlocks - 1 ? 1 : 0;
  out[first + thread + beyond] = value + agreed;
}

void run(Arguments& a) {
  constexpr int64_t kNumbers = kBlocks * kBlockThreads;
  const int* const in = a.input<int>("in");
  int* const out = a.output<int>("out", kNumbers);
  int* const flag = a.output<int>("flag", kBlocks);
  const int fault = static_cast<int>(a.integer("fault"));
  MOESCALE_LAUNCH(reverse_and_add, kBlocks, kBlockThreads, kBlockThreads * sizeof(int), nullptr, in, out, flag, fault);
}

}  // namespace
}  // namespace moescale::cuda

int main(int count, char** values) {
  Arguments arguments(count, values);
  moescale::cuda::run(arguments);
  return 0;
}
