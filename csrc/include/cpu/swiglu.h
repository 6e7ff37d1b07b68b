// act = weight * silu(gate) * up, row by row, and its gradients (Shazeer 2020, 2002.05202, eq. 6).
#pragma once

#include "arithmetic.h"

namespace moescale::MOESCALE_ISA {

// Bytes: 2 R * F read, R * F written.
template <class T>
void swiglu(const T* gate_up, const Sum<T>* weight_TK, const int64_t* visit_R, int64_t width, T* act_RF, int64_t begin,
            int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const T* gate = gate_up + 2 * r * width;
    const T* up = gate + width;
    T* act = act_RF + r * width;
    if (visit_R && visit_R[r] < 0) {
      std::memset(act, 0, width * sizeof(T));
      continue;
    }
    const Sum<T> weight = visit_R ? weight_TK[visit_R[r]] : Sum<T>(1);
    for_each_place(width, [&](int64_t column, int) {
      const Sum<T> g = widen(gate[column]);
      store(act + column, g * sigmoid(g) * widen(up[column]) * weight);
    });
  }
}

// With s = sigmoid(g), a = g s u and the incoming gradient y of weight * a:
//   d weight = sum y a,  d u = w y g s,  d g = w y u s (1 + g (1 - s)).
// Bytes: 3 R * F read, 3 R * F written.
template <class T>
void swiglu_backward(T* act_RF, const T* gate_up, const Sum<T>* weight_TK, const int64_t* visit_R, int64_t width,
                     T* grad_gate_up, Sum<T>* grad_weight_TK, int64_t begin, int64_t end) {
  using S = Sum<T>;
  for (int64_t r = begin; r < end; ++r) {
    const T* gate = gate_up + 2 * r * width;
    const T* up = gate + width;
    T* act = act_RF + r * width;
    T* grad_gate = grad_gate_up + 2 * r * width;
    T* grad_up = grad_gate + width;
    if (visit_R && visit_R[r] < 0) {
      std::memset(act, 0, width * sizeof(T));
      std::memset(grad_gate, 0, 2 * width * sizeof(T));
      continue;
    }
    const S weight = visit_R ? weight_TK[visit_R[r]] : S(1);
    S lanes[kLanes] = {};
    for_each_place(width, [&](int64_t column, int lane) {
      const S g = widen(gate[column]), u = widen(up[column]), y = widen(act[column]);
      const S s = sigmoid(g);
      const S silu = g * s;
      lanes[lane] += y * (silu * u);
      const S wy = weight * y;
      store(grad_up + column, wy * silu);
      store(grad_gate + column, wy * u * (s * (S(1) + g * (S(1) - s))));
      store(act + column, silu * u * weight);
    });
    if (visit_R) grad_weight_TK[visit_R[r]] = sum_lanes(lanes);
  }
}

}  // namespace moescale::MOESCALE_ISA
