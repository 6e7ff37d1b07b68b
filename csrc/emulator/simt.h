// Executes CUDA kernels on a CPU, to find their errors where there is no GPU.
//
// Every CUDA thread is a fiber with a stack of its own. Fibers run one at a time and give way where threads wait for
// each other: at __syncthreads and at the *_sync functions of a warp. Blocks run one after another. Which fiber and
// which block comes next is drawn from a seed, so several seeds see several interleavings. Reported as errors:
//   a barrier or warp function that not all of its threads reach, or that they reach on different lines
//   a mask without its caller, with threads that have left, or that differs between its lanes
//   a shuffle from a lane outside the mask
// Shared memory is poisoned before each block. Under ThreadSanitizer two accesses of different threads are ordered
// only by __syncthreads, __syncwarp and the launch itself; under AddressSanitizer shared memory ends where the launch
// said. Not modelled: weak memory ordering of atomics, asynchronous copies, speed.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <source_location>
#include <type_traits>

#include "types.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

extern uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace simt {

using Where = std::source_location;

/// What the lanes of a warp do together.
enum class Collective { kSyncwarp, kShuffle, kShuffleUp, kShuffleXor, kMatch, kReduceMax, kReduceMin };

/// 0 runs threads and blocks in their order; any other seed draws an order.
void set_seed(uint64_t seed);

/// Runs `body` once for every thread of `grid` blocks, and returns when all have left.
void launch(const char* kernel, int64_t grid, int threads, size_t shared_bytes, const std::function<void()>& body);

/// The running block's shared memory: exactly the bytes of its launch.
unsigned char* shared_memory();

/// Waits for the whole block.
void barrier(Where where);

/// Waits for the lanes in `mask`; returns what each of the warp's 32 lanes brought (0 for lanes outside the mask).
const uint64_t* exchange(Collective collective, unsigned mask, uint64_t value, Where where);

/// The value of lane `source` for a lane of `mask`.
uint64_t read_lane(const uint64_t* values, unsigned mask, int source, Where where);

int lane();

template <typename T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <typename T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

template <typename T>
T shuffle(Collective collective, unsigned mask, T value, int source, Where where) {
  const uint64_t* const values = exchange(collective, mask, to_bits(value), where);
  return from_bits<T>(read_lane(values, mask, source, where));
}

/// Folds the values of the lanes in `mask`.
template <typename T, typename Fold>
T reduce(Collective collective, unsigned mask, T value, Fold fold, Where where) {
  const uint64_t* const values = exchange(collective, mask, to_bits(value), where);
  T result = value;
  for (int i = 0; i < 32; ++i) {
    if (mask >> i & 1) result = fold(result, from_bits<T>(values[i]));
  }
  return result;
}

}  // namespace simt

// CUDA's functions, as far as the kernels use them.

using std::isinf;
using std::isnan;
using std::max;
using std::min;

inline void __syncthreads(simt::Where where = simt::Where::current()) { simt::barrier(where); }

inline void __syncwarp(unsigned mask = ~0u, simt::Where where = simt::Where::current()) {
  simt::exchange(simt::Collective::kSyncwarp, mask, 0, where);
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, simt::Where where = simt::Where::current()) {
  return simt::shuffle(simt::Collective::kShuffle, mask, value, source & 31, where);
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, int delta, simt::Where where = simt::Where::current()) {
  const int source = simt::lane() - delta;
  return simt::shuffle(simt::Collective::kShuffleUp, mask, value, source < 0 ? simt::lane() : source, where);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, simt::Where where = simt::Where::current()) {
  return simt::shuffle(simt::Collective::kShuffleXor, mask, value, simt::lane() ^ bits, where);
}

inline unsigned __match_any_sync(unsigned mask, int value, simt::Where where = simt::Where::current()) {
  const uint64_t* const values = simt::exchange(simt::Collective::kMatch, mask, simt::to_bits(value), where);
  unsigned same = 0;
  for (int i = 0; i < 32; ++i) {
    if ((mask >> i & 1) && simt::from_bits<int>(values[i]) == value) same |= 1u << i;
  }
  return same;
}

inline unsigned __reduce_max_sync(unsigned mask, unsigned value, simt::Where where = simt::Where::current()) {
  const auto larger = [](unsigned a, unsigned b) { return a > b ? a : b; };
  return simt::reduce(simt::Collective::kReduceMax, mask, value, larger, where);
}

inline unsigned __reduce_min_sync(unsigned mask, unsigned value, simt::Where where = simt::Where::current()) {
  const auto smaller = [](unsigned a, unsigned b) { return a < b ? a : b; };
  return simt::reduce(simt::Collective::kReduceMin, mask, value, smaller, where);
}

inline int atomicAdd(int* address, int value) { return __atomic_fetch_add(address, value, __ATOMIC_RELAXED); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
