// Backward of route: one warp takes one token, and recomputes its scores.
#pragma once

#include "route.cuh"

namespace moescale::cuda {

struct RouteGradients {
  const float* weight_TK;
  const float* logsumexp_T;
  const float* scored_BE;
};

/// `mask_T` may be null.
struct RouteSaved {
  const float* logits_TE;
  const int64_t* index_TK;
  const float* logsumexp_T;
  const bool* mask_T;
};

/// The token's visit of a lane: lane k has the k-th.
struct VisitGradient {
  int expert = -1;
  float score = 0.0f;
  float grad_score = 0.0f;
};

/// Gradient of the score of each visit. With s the selected scores, w_k = scale * s_k / (sum of s), so that
/// dL/ds_k = (scale * g_k - sum over j of g_j * w_j) / (sum of s).
__device__ __forceinline__ VisitGradient gradient_of_visits(const RouteGradients& grads, const RouteSaved& saved,
                                                            const RouteShape& shape, const ScoreRule& rule,
                                                            int64_t token) {
  VisitGradient visit;
  float grad = 0.0f;
  const int64_t k = token * shape.active + lane_index();
  if (lane_index() < shape.active && within(saved.index_TK[k], shape.experts)) {
    visit.expert = static_cast<int>(saved.index_TK[k]);
    visit.score =
        score_of(saved.logits_TE[token * shape.experts + visit.expert], saved.logsumexp_T[token], rule.sigmoid);
    grad = rule.scale * grads.weight_TK[k];
  }
  if (rule.normalized) {
    const float sum = warp_sum(visit.score) + kTiny;
    const float mean = warp_sum(grad * visit.score) / sum;
    grad = (grad - mean) / sum;
  }
  visit.grad_score = visit.expert >= 0 ? grad : 0.0f;
  return visit;
}

/// What a logit's gradient is made of besides its own score: the same for all experts of a token.
struct TokenSums {
  float logsumexp;
  float grad_logsumexp;
  float scores;       // sum of the scores (sigmoid only)
  float grad_scored;  // sum over experts of grad_scored * p
  float grad_visits;  // sum over visits of grad_score * s (softmax only)
};

/// dL/dlogit of one expert, given the gradient of its score by a visit (0 without one).
/// Softmax: s * (G - sum of G * s), G being the gradient of s. Sigmoid: G * s * (1 - s). Both: + dL/dlse * softmax.
__device__ __forceinline__ float gradient_of_logit(float logit, float grad_scored, float grad_visit,
                                                   const TokenSums& sums, bool sigmoid) {
  const float softmax = expf(logit - sums.logsumexp);
  if (!sigmoid) return softmax * (grad_scored + grad_visit - sums.grad_scored - sums.grad_visits + sums.grad_logsumexp);
  const float score = score_of(logit, sums.logsumexp, true);
  const float grad_score = grad_visit + (grad_scored - sums.grad_scored) / (sums.scores + kTiny);
  return grad_score * score * (1.0f - score) + sums.grad_logsumexp * softmax;
}

/// The token's sums over all experts.
__device__ __forceinline__ TokenSums sums_of_token(const float* logits_E, const float* grad_scored_E, float logsumexp,
                                                   float grad_logsumexp, const VisitGradient& visit, int experts,
                                                   bool sigmoid) {
  float scores = 0.0f;
  float grad_scored = 0.0f;
  for (int expert = lane_index(); expert < experts; expert += kWarp) {
    const float score = score_of(logits_E[expert], logsumexp, sigmoid);
    scores += score;
    grad_scored = fmaf(grad_scored_E[expert], score, grad_scored);
  }
  TokenSums sums{logsumexp, grad_logsumexp, warp_sum(scores), warp_sum(grad_scored), 0.0f};
  if (sigmoid) sums.grad_scored /= sums.scores + kTiny;
  else sums.grad_visits = warp_sum(visit.grad_score * visit.score);
  return sums;
}

/// Writes every logit as if its expert had no visit, then the visited ones again: a token's experts are distinct.
static __global__ void __launch_bounds__(kThreads)
    route_backward_kernel(RouteGradients grads, RouteSaved saved, RouteShape shape, ScoreRule rule,
                          float* __restrict__ grad_logits_TE) {
  const int64_t token = row_of_warp();
  if (token >= shape.tokens) return;
  float* const grad_logits = grad_logits_TE + token * shape.experts;
  if (saved.mask_T != nullptr && !saved.mask_T[token]) {
    for (int expert = lane_index(); expert < shape.experts; expert += kWarp) grad_logits[expert] = 0.0f;
    return;
  }
  const float* const logits = saved.logits_TE + token * shape.experts;
  const float* const grad_scored =
      grads.scored_BE + static_cast<int64_t>(sequence_of(shape, token)) * shape.experts;
  const VisitGradient visit = gradient_of_visits(grads, saved, shape, rule, token);
  const TokenSums sums = sums_of_token(logits, grad_scored, saved.logsumexp_T[token], grads.logsumexp_T[token], visit,
                                       shape.experts, rule.sigmoid);
  for (int expert = lane_index(); expert < shape.experts; expert += kWarp) {
    grad_logits[expert] = gradient_of_logit(logits[expert], grad_scored[expert], 0.0f, sums, rule.sigmoid);
  }
  __syncwarp();
  if (visit.expert < 0) return;
  grad_logits[visit.expert] =
      gradient_of_logit(logits[visit.expert], grad_scored[visit.expert], visit.grad_score, sums, rule.sigmoid);
}

static inline void launch_route_backward(const RouteGradients& grads, const RouteSaved& saved,
                                         const RouteShape& shape, const ScoreRule& rule, float* grad_logits_TE,
                                         cudaStream_t stream) {
  if (shape.tokens == 0) return;
  MOESCALE_LAUNCH(route_backward_kernel, blocks_for(shape.tokens), kThreads, 0, stream, grads, saved, shape, rule,
                  grad_logits_TE);
}

}  // namespace moescale::cuda
