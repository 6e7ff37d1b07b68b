// What the kernels share: number formats, 16-byte packs, sums over a warp, and launching.
//
// Kernel headers include no torch. nvcc compiles them for GPUs; with MOESCALE_EMULATOR a host compiler compiles the
// same text against csrc/emulator, which executes it on a CPU.
//
// Shape suffixes: T tokens, D model width, F expert width, E experts, K visits a token, R rows, B sequences.
#pragma once

#include <cstdint>

#ifdef MOESCALE_EMULATOR
#include "../../emulator/simt.h"
#define MOESCALE_LAUNCH(kernel, grid, threads, shared_bytes, stream, ...) \
  simt::launch(#kernel, grid, threads, shared_bytes, [=] { (kernel)(__VA_ARGS__); })
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define MOESCALE_LAUNCH(kernel, grid, threads, shared_bytes, stream, ...) \
  (kernel)<<<grid, threads, shared_bytes, stream>>>(__VA_ARGS__)
#endif

namespace moescale::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kMaxExperts = 1024;
constexpr int kMaxActive = kWarp;  // a lane holds a visit

constexpr int kWarpsPerBlock = 8;
constexpr int kThreads = kWarpsPerBlock * kWarp;

template <typename Integer>
__host__ __device__ constexpr Integer ceil_div(Integer value, Integer unit) {
  return (value + unit - 1) / unit;
}

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

/// `value` rounded to T, to nearest with ties to even.
template <typename T>
__device__ __forceinline__ T round_to(float value);
template <>
__device__ __forceinline__ float round_to<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ __half round_to<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 round_to<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

/// The 16 bytes that a lane moves with one instruction.
template <typename T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T at[kSize];
};

/// Pack `column` of a row that starts at `row`; rows are 16-byte aligned.
template <typename T>
__device__ __forceinline__ Pack<T> load_pack(const T* row, int column) {
  return reinterpret_cast<const Pack<T>*>(row)[column];
}

template <typename T>
__device__ __forceinline__ void store_pack(T* row, int column, const Pack<T>& pack) {
  reinterpret_cast<Pack<T>*>(row)[column] = pack;
}

template <typename T>
__device__ __forceinline__ Pack<T> zero_pack() {
  Pack<T> pack;
#pragma unroll
  for (int i = 0; i < Pack<T>::kSize; ++i) pack.at[i] = round_to<T>(0.0f);
  return pack;
}

/// Number of packs in a row of `width` elements.
template <typename T>
__host__ __device__ constexpr int packs_of(int64_t width) {
  return static_cast<int>(width / Pack<T>::kSize);
}

__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ __forceinline__ int warp_index() { return static_cast<int>(threadIdx.x) / kWarp; }

/// The row (or token) of this warp in kernels where every warp takes one.
__device__ __forceinline__ int64_t row_of_warp() {
  return static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + warp_index();
}
inline unsigned blocks_for(int64_t rows) {
  return static_cast<unsigned>(ceil_div<int64_t>(rows, kWarpsPerBlock));
}

/// Whether `index` lies in [0, size); one comparison serves both ends.
__device__ __forceinline__ bool within(int64_t index, int64_t size) {
  return static_cast<uint64_t>(index) < static_cast<uint64_t>(size);
}

template <typename T>
__device__ __forceinline__ void zero_row(T* row, int packs) {
#pragma unroll 1
  for (int column = lane_index(); column < packs; column += kWarp) store_pack(row, column, zero_pack<T>());
}

/// Sum over the lanes of a warp, equal to the last bit in every lane: each step adds the same two halves.
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, step));
  return value;
}

/// Inclusive prefix sum over the lanes of a warp.
__device__ __forceinline__ int warp_prefix_sum(int value) {
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const int before = __shfl_up_sync(kAllLanes, value, step);
    if (lane_index() >= step) value += before;
  }
  return value;
}

/// The block's shared memory, sized at launch.
__device__ __forceinline__ unsigned char* shared_memory() {
#ifdef MOESCALE_EMULATOR
  return simt::shared_memory();
#else
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
#endif
}

}  // namespace moescale::cuda
