// Scores, the K best experts of each token, and the sums that balancing needs, in one pass over the logits.
// Bytes: T * E read, everything else is T * K or B * E. The backward pass reads T * E and writes T * E.
#pragma once

#include <limits>
#include <vector>

#include "arithmetic.h"

namespace moescale::MOESCALE_ISA {

template <class T>
constexpr T kTiny = T(1e-20);
template <class T>
constexpr T kForbidden = -std::numeric_limits<T>::infinity();

// A token's scores and probabilities. For a softmax they are the same numbers, and their total is 1.
template <class T>
struct Scores {
  T *score_E, *prob_E;
  T total, largest, log_sum, logsumexp;  // logsumexp = largest + log_sum

  // `scratch` holds 2 E numbers.
  Scores(const T* logits_E, int64_t experts, bool use_sigmoid, T* scratch) : score_E(scratch), prob_E(scratch) {
    largest = largest_of(logits_E, experts);
    for (int64_t e = 0; e < experts; ++e) prob_E[e] = fast_exp(logits_E[e] - largest);
    const T sum = sum_over<T>(experts, [&](int64_t e) { return prob_E[e]; });
    log_sum = std::log(sum);
    logsumexp = largest + log_sum;
    total = T(1);
    if (use_sigmoid) {
      score_E = scratch + experts;
      for (int64_t e = 0; e < experts; ++e) score_E[e] = sigmoid(logits_E[e]);
      total = sum_over<T>(experts, [&](int64_t e) { return score_E[e]; }) + kTiny<T>;
    }
    const T share = T(1) / (use_sigmoid ? total : sum);
    for (int64_t e = 0; e < experts; ++e) prob_E[e] = score_E[e] * share;
  }
};

// Moves the best of wanted_E into index_K, one after the other; ties go to the lower expert. -1 when none is left.
template <class T>
inline void select_best(T* wanted_E, int64_t experts, int64_t active, int64_t* index_K) {
  for (int64_t k = 0; k < active; ++k) {
    index_K[k] = place_of_largest(wanted_E, experts);
    if (index_K[k] >= 0) wanted_E[index_K[k]] = kForbidden<T>;
  }
}

template <class T>
inline void weigh(const T* score_E, const int64_t* index_K, const RouteShape& shape, T* weight_K) {
  T total = 0;
  for (int64_t k = 0; k < shape.active; ++k) {
    weight_K[k] = index_K[k] < 0 ? T(0) : score_E[index_K[k]];
    total += weight_K[k];
  }
  const T factor = shape.normalized ? T(1) / (total + kTiny<T>) : T(1);
  for (int64_t k = 0; k < shape.active; ++k) weight_K[k] *= factor * T(shape.scale);
}

// -sum p log p. For a softmax it is logsumexp - sum p l: no logarithm an expert. Both terms are taken relative to the
// largest logit, since large ones would cancel.
template <class T>
inline T entropy(const Scores<T>& found, const T* logits_E, int64_t experts, bool use_sigmoid) {
  const T* prob_E = found.prob_E;
  if (use_sigmoid) {
    return -sum_over<T>(experts, [&](int64_t e) { return prob_E[e] > T(0) ? prob_E[e] * std::log(prob_E[e]) : T(0); });
  }
  return found.log_sum - sum_over<T>(experts, [&](int64_t e) {
           return prob_E[e] > T(0) ? prob_E[e] * (logits_E[e] - found.largest) : T(0);
         });
}

template <class T>
void route(const T* logits_TE, const T* bias_E, const bool* allowed_TE, const bool* mask_T, const RouteShape& shape,
           const RouteOutputs<T>& out, int64_t begin, int64_t end) {
  const int64_t experts = shape.experts, active = shape.active;
  std::vector<T> scratch(3 * experts);
  T* wanted_E = scratch.data() + 2 * experts;
  for (int64_t b = begin; b < end; ++b) {
    T *scored_E = out.scored_BE + b * experts, *visits_E = out.visits_BE + b * experts;
    for (int64_t e = 0; e < experts; ++e) scored_E[e] = visits_E[e] = T(0);
    for (int64_t place = 0; place < shape.length; ++place) {
      const int64_t t = b * shape.sequence_stride + place * shape.token_stride;
      int64_t* index_K = out.index_TK + t * active;
      T* weight_K = out.weight_TK + t * active;
      if (mask_T && !mask_T[t]) {
        for (int64_t k = 0; k < active; ++k) index_K[k] = -1, weight_K[k] = T(0);
        out.logsumexp_T[t] = out.entropy_T[t] = T(0);
        continue;
      }
      const T* logits_E = logits_TE + t * experts;
      const Scores<T> found(logits_E, experts, shape.sigmoid, scratch.data());
      for (int64_t e = 0; e < experts; ++e) {
        const T wanted = bias_E ? found.score_E[e] + bias_E[e] : found.score_E[e];
        const bool forbidden = wanted != wanted || (allowed_TE && !allowed_TE[t * experts + e]);
        wanted_E[e] = forbidden ? kForbidden<T> : wanted;
      }
      select_best(wanted_E, experts, active, index_K);
      weigh(found.score_E, index_K, shape, weight_K);
      for (int64_t k = 0; k < active; ++k) {
        if (index_K[k] >= 0) visits_E[index_K[k]] += T(1);
      }
      for (int64_t e = 0; e < experts; ++e) scored_E[e] += found.prob_E[e];
      out.logsumexp_T[t] = found.logsumexp;
      out.entropy_T[t] = entropy(found, logits_E, experts, shape.sigmoid);
    }
  }
}

// d loss / d score of the selected experts, from the gradients of their weights.
template <class T>
inline void selected_gradients(const T* grad_weight_K, const T* score_E, const int64_t* index_K,
                               const RouteShape& shape, T* grad_score_E) {
  T total = 0, mean = 0;
  for (int64_t k = 0; k < shape.active; ++k) {
    if (index_K[k] < 0) continue;
    total += score_E[index_K[k]];
    mean += grad_weight_K[k] * score_E[index_K[k]];
  }
  total += kTiny<T>;
  mean /= total;
  for (int64_t k = 0; k < shape.active; ++k) {
    if (index_K[k] < 0) continue;
    const T grad = shape.normalized ? (grad_weight_K[k] - mean) / total : grad_weight_K[k];
    grad_score_E[index_K[k]] += grad * T(shape.scale);
  }
}

// The gradient of logit e, with L the loss, p = s / total and grad_s the gradients through the weights:
//   softmax: p_e (grad_s_e + dL/dp_e - sum_j p_j (grad_s_j + dL/dp_j) + dL/dlogsumexp)
//   sigmoid: (grad_s_e + (dL/dp_e - sum_j p_j dL/dp_j) / total) s_e (1 - s_e) + dL/dlogsumexp softmax_e
template <class T>
inline void logit_gradients(const Scores<T>& found, const T* logits_E, const T* grad_score_E, const T* grad_prob_E,
                            T grad_logsumexp, const RouteShape& shape, T* grad_logits_E) {
  const T *prob_E = found.prob_E, *score_E = found.score_E;
  if (shape.sigmoid) {
    const T mean = sum_over<T>(shape.experts, [&](int64_t e) { return grad_prob_E[e] * prob_E[e]; });
    for (int64_t e = 0; e < shape.experts; ++e) {
      const T grad_score = grad_score_E[e] + (grad_prob_E[e] - mean) / found.total;
      grad_logits_E[e] = grad_score * score_E[e] * (T(1) - score_E[e]) +
                         grad_logsumexp * fast_exp(logits_E[e] - found.logsumexp);
    }
  } else {
    const T mean =
        sum_over<T>(shape.experts, [&](int64_t e) { return (grad_score_E[e] + grad_prob_E[e]) * prob_E[e]; });
    for (int64_t e = 0; e < shape.experts; ++e) {
      grad_logits_E[e] = prob_E[e] * (grad_score_E[e] + grad_prob_E[e] - mean + grad_logsumexp);
    }
  }
}

template <class T>
void route_backward(const RouteGradients<T>& grad, const T* logits_TE, const int64_t* index_TK, const bool* mask_T,
                    const RouteShape& shape, T* grad_logits_TE, int64_t begin, int64_t end) {
  const int64_t experts = shape.experts, active = shape.active;
  std::vector<T> scratch(3 * experts);
  T* grad_score_E = scratch.data() + 2 * experts;
  for (int64_t b = begin; b < end; ++b) {
    const T* grad_prob_E = grad.scored_BE + b * experts;
    for (int64_t place = 0; place < shape.length; ++place) {
      const int64_t t = b * shape.sequence_stride + place * shape.token_stride;
      T* grad_logits_E = grad_logits_TE + t * experts;
      if (mask_T && !mask_T[t]) {
        for (int64_t e = 0; e < experts; ++e) grad_logits_E[e] = T(0);
        continue;
      }
      const T* logits_E = logits_TE + t * experts;
      const Scores<T> found(logits_E, experts, shape.sigmoid, scratch.data());
      for (int64_t e = 0; e < experts; ++e) grad_score_E[e] = T(0);
      selected_gradients(grad.weight_TK + t * active, found.score_E, index_TK + t * active, shape, grad_score_E);
      logit_gradients(found, logits_E, grad_score_E, grad_prob_E, grad.logsumexp_T[t], shape, grad_logits_E);
    }
  }
}

}  // namespace moescale::MOESCALE_ISA
