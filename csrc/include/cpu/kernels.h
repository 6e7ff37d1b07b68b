// The row kernels of one element type as a table, filled once for each instruction set (cpu/isa_*.cpp).
//
// A kernel works on a range of rows, tokens or sequences, and what it writes depends on no other range: so results do
// not depend on how a range is cut into threads. Letters: T tokens, D width, F expert width, E experts, K visits a
// token, R rows, B sequences. -1 means "nothing here" in `visit_R`, `row_TK` and `index_TK`. Sums are taken in Sum.
#pragma once

#include <cstdint>

namespace moescale {

struct Bf16 {
  uint16_t bits;
};

template <class T>
struct SumOf {
  using type = float;
};
template <>
struct SumOf<double> {
  using type = double;
};
template <class T>
using Sum = typename SumOf<T>::type;

template <class T>
struct RowKernels {
  // Writes the rows that have a visit, of `rows` in all; rows outside them count as -1.
  void (*permute)(const T* x_TD, const int64_t* row_TK, int64_t active, int64_t width, T* rows_RD, int64_t rows,
                  int64_t begin, int64_t end);
  void (*gather)(const T* x_TD, const int64_t* visit_R, int64_t active, int64_t width, T* rows_RD, int64_t begin,
                 int64_t end);
  void (*combine)(const T* rows_RD, const int64_t* row_TK, const Sum<T>* weight_TK, int64_t active, int64_t width,
                  T* out_TD, int64_t tokens, int64_t begin, int64_t end);
  void (*combine_backward)(const T* grad_TD, const T* rows_RD, const int64_t* visit_R, const Sum<T>* weight_TK,
                           int64_t active, int64_t width, T* grad_rows_RD, Sum<T>* grad_weight_TK, int64_t rows,
                           int64_t begin, int64_t end);
  // visit_R and weight_TK may be null together: then every row counts, with weight 1.
  void (*swiglu)(const T* gate_up, const Sum<T>* weight_TK, const int64_t* visit_R, int64_t width, T* act_RF,
                 int64_t rows, int64_t begin, int64_t end);
  // Reads the gradient of the activations from act_RF and leaves the activations there.
  void (*swiglu_backward)(T* act_RF, const T* gate_up, const Sum<T>* weight_TK, const int64_t* visit_R, int64_t width,
                          T* grad_gate_up, Sum<T>* grad_weight_TK, int64_t rows, int64_t begin, int64_t end);
};

// What routing takes besides the scores. Token t is the `place`-th of sequence b at `b * sequence_stride + place *
// token_stride`.
struct RouteShape {
  int64_t experts, active, length;  // length: tokens of a sequence
  int64_t sequence_stride, token_stride;
  bool sigmoid, normalized;
  double scale;
};

template <class T>
struct RouteOutputs {
  T* weight_TK;
  int64_t* index_TK;
  T* logsumexp_T;
  T* scored_BE;
  T* visits_BE;
  T* entropy_T;
};

template <class T>
struct RouteGradients {
  const T* weight_TK;
  const T* logsumexp_T;
  const T* scored_BE;
};

// Both work on a range of sequences, one sequence from its first token to its last.
template <class T>
struct RouteKernels {
  void (*route)(const T* logits_TE, const T* bias_E, const bool* allowed_TE, const bool* mask_T,
                const RouteShape& shape, const RouteOutputs<T>& out, int64_t begin, int64_t end);
  void (*route_backward)(const RouteGradients<T>& grad, const T* logits_TE, const int64_t* index_TK,
                         const bool* mask_T, const RouteShape& shape, T* grad_logits_TE,
                         int64_t begin, int64_t end);
};

// The tables of the best instruction set that this processor has.
template <class T>
const RowKernels<T>& row_kernels();
template <class T>
const RouteKernels<T>& route_kernels();
const char* instruction_set();

}  // namespace moescale
