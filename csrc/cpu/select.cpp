// Which instruction set serves this process: the best one that the processor has.
#include "../include/cpu/kernels.h"

namespace moescale {

#define MOESCALE_TABLES_OF(isa)             \
  namespace isa {                           \
  template <class T>                        \
  const RowKernels<T>& rows_table();        \
  template <class T>                        \
  const RouteKernels<T>& route_table();     \
  }
MOESCALE_TABLES_OF(generic)
#if defined(__x86_64__)
MOESCALE_TABLES_OF(avx2)
MOESCALE_TABLES_OF(avx512)
#endif

namespace {

enum class Isa { generic, avx2, avx512 };

Isa best() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return Isa::avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::generic;
}

const Isa kIsa = best();

}  // namespace

template <class T>
const RowKernels<T>& row_kernels() {
#if defined(__x86_64__)
  if (kIsa == Isa::avx512) return avx512::rows_table<T>();
  if (kIsa == Isa::avx2) return avx2::rows_table<T>();
#endif
  return generic::rows_table<T>();
}

template <class T>
const RouteKernels<T>& route_kernels() {
#if defined(__x86_64__)
  if (kIsa == Isa::avx512) return avx512::route_table<T>();
  if (kIsa == Isa::avx2) return avx2::route_table<T>();
#endif
  return generic::route_table<T>();
}

const char* instruction_set() {
  return kIsa == Isa::avx512 ? "AVX-512" : kIsa == Isa::avx2 ? "AVX2" : "generic";
}

template const RowKernels<float>& row_kernels<float>();
template const RowKernels<double>& row_kernels<double>();
template const RowKernels<Bf16>& row_kernels<Bf16>();
template const RouteKernels<float>& route_kernels<float>();
template const RouteKernels<double>& route_kernels<double>();

}  // namespace moescale
