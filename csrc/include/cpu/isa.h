// The tables of one instruction set. A file of cpu/ defines MOESCALE_ISA, the name of a namespace, MOESCALE_VECTOR, the
// bytes of a register, and the compiler's target, and includes this: so every kernel is compiled once for each instruction
// set from one source.
#pragma once

#include "combine.h"
#include "permute.h"
#include "route.h"
#include "swiglu.h"

namespace moescale::MOESCALE_ISA {

template <class T>
const RowKernels<T>& rows_table() {
  static const RowKernels<T> table{permute<T>, gather<T>, combine<T>, combine_backward<T>, swiglu<T>, swiglu_backward<T>};
  return table;
}

template <class T>
const RouteKernels<T>& route_table() {
  static const RouteKernels<T> table{route<T>, route_backward<T>};
  return table;
}

template const RowKernels<float>& rows_table<float>();
template const RowKernels<double>& rows_table<double>();
template const RowKernels<Bf16>& rows_table<Bf16>();
template const RouteKernels<float>& route_table<float>();
template const RouteKernels<double>& route_table<double>();

}  // namespace moescale::MOESCALE_ISA
