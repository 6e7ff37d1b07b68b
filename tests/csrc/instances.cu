// Every kernel in every dtype, for the resource gate and the disassembly. Calling the launchers instantiates them all.
#include <cstdint>
#include <type_traits>

#include "assign.cuh"
#include "combine.cuh"
#include "permute.cuh"
#include "route_backward.cuh"
#include "swiglu.cuh"

namespace moescale::cuda {

#define INSTANTIATE(T)                                                                                               \
  template void launch_combine(const T*, const int64_t*, const float*, T*, int64_t, int64_t, int, int64_t,          \
                               cudaStream_t);                                                                       \
  template void launch_combine_backward(const T*, const T*, const int64_t*, const float*, T*, float*, int64_t,      \
                                        int64_t, int, int64_t, cudaStream_t);                                       \
  template void launch_swiglu(const T*, RowWeights, T*, int64_t, int64_t, cudaStream_t);                            \
  template void launch_swiglu_backward(T*, const T*, RowWeights, T*, float*, int64_t, int64_t, cudaStream_t);

INSTANTIATE(float)
INSTANTIATE(__half)
INSTANTIATE(__nv_bfloat16)

}  // namespace moescale::cuda
