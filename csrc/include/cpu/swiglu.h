// act = weight * silu(gate) * up, row by row, and its gradients (Shazeer 2020, 2002.05202, eq. 6).
#pragma once

#include "arithmetic.h"
#include "stream.h"

namespace moescale::MOESCALE_ISA {

// `count` <= kLanes columns of a row's activations.
template <class T>
inline void swiglu_columns(const T* gate, const T* up, Sum<T> weight, int count, T* act) {
#pragma GCC ivdep
  for (int i = 0; i < count; ++i) {
    const Sum<T> g = widen(gate[i]);
    store(act + i, g * sigmoid(g) * widen(up[i]) * weight);
  }
}

template <bool kStream, class T>
void swiglu_row(const T* gate, const T* up, Sum<T> weight, int64_t width, T* act) {
  alignas(kLine) T columns[kLanes];  // whole lines
  int64_t first = 0;
  for (; first + kLanes <= width; first += kLanes) {
    swiglu_columns(gate + first, up + first, weight, kLanes, columns);
    copy<kStream>(act + first, columns, sizeof columns);
  }
  swiglu_columns(gate + first, up + first, weight, static_cast<int>(width - first), act + first);
}

// Bytes: 2 R * F read, R * F written.
template <class T>
void swiglu(const T* gate_up, const Sum<T>* weight_TK, const int64_t* visit_R, int64_t width, T* act_RF, int64_t rows,
            int64_t begin, int64_t end) {
  const int64_t row_bytes = width * sizeof(T);
  const bool stream = streams(act_RF, row_bytes, rows * row_bytes);
  const auto row = stream ? swiglu_row<true, T> : swiglu_row<false, T>;
  for (int64_t r = begin; r < end; ++r) {
    const T* gate = gate_up + 2 * r * width;
    T* act = act_RF + r * width;
    if (visit_R && visit_R[r] < 0) {
      std::memset(act, 0, row_bytes);
      continue;
    }
    row(gate, gate + width, visit_R ? weight_TK[visit_R[r]] : Sum<T>(1), width, act);
  }
  if (stream) fence();
}

// With s = sigmoid(g), a = g s u and the incoming gradient y of weight * a:
//   d weight = sum y a,  d u = w y g s,  d g = w y u s (1 + g (1 - s)).
template <class T>
inline void swiglu_gradient_columns(const T* gate, const T* up, Sum<T> weight, int count, T* act, T* grad_gate,
                                    T* grad_up, Sum<T>* lanes) {
  using S = Sum<T>;
#pragma GCC ivdep
  for (int i = 0; i < count; ++i) {
    const S g = widen(gate[i]), u = widen(up[i]), y = widen(act[i]);
    const S s = sigmoid(g);
    const S silu = g * s;
    lanes[i] += y * (silu * u);
    const S wy = weight * y;
    store(grad_up + i, wy * silu);
    store(grad_gate + i, wy * u * (s * (S(1) + g * (S(1) - s))));
    store(act + i, silu * u * weight);
  }
}

template <bool kStream, class T>
Sum<T> swiglu_gradient_row(const T* gate, Sum<T> weight, int64_t width, T* act, T* grad_gate) {
  const T* up = gate + width;
  T* grad_up = grad_gate + width;
  Sum<T> lanes[kLanes] = {};
  alignas(kLine) T of_gate[kLanes], of_up[kLanes];  // whole lines
  int64_t first = 0;
  for (; first + kLanes <= width; first += kLanes) {
    swiglu_gradient_columns(gate + first, up + first, weight, kLanes, act + first, of_gate, of_up, lanes);
    copy<kStream>(grad_gate + first, of_gate, sizeof of_gate);
    copy<kStream>(grad_up + first, of_up, sizeof of_up);
  }
  swiglu_gradient_columns(gate + first, up + first, weight, static_cast<int>(width - first), act + first,
                          grad_gate + first, grad_up + first, lanes);
  return sum_lanes(lanes);
}

// Bytes: 3 R * F read, 3 R * F written.
template <class T>
void swiglu_backward(T* act_RF, const T* gate_up, const Sum<T>* weight_TK, const int64_t* visit_R, int64_t width,
                     T* grad_gate_up, Sum<T>* grad_weight_TK, int64_t rows, int64_t begin, int64_t end) {
  const int64_t row_bytes = width * sizeof(T);
  const bool stream = streams(grad_gate_up, row_bytes, 2 * rows * row_bytes);
  const auto row = stream ? swiglu_gradient_row<true, T> : swiglu_gradient_row<false, T>;
  for (int64_t r = begin; r < end; ++r) {
    T* act = act_RF + r * width;
    T* grad_gate = grad_gate_up + 2 * r * width;
    if (visit_R && visit_R[r] < 0) {
      std::memset(act, 0, row_bytes);
      std::memset(grad_gate, 0, 2 * row_bytes);
      continue;
    }
    const Sum<T> weight = visit_R ? weight_TK[visit_R[r]] : Sum<T>(1);
    const Sum<T> grad_weight = row(gate_up + 2 * r * width, weight, width, act, grad_gate);
    if (visit_R) grad_weight_TK[visit_R[r]] = grad_weight;
  }
  if (stream) fence();
}

}  // namespace moescale::MOESCALE_ISA
