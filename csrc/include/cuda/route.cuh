// route: scores of the logits, the K best experts of each token, and the sums that balancing needs.
//
// One warp takes one token at a time and several tokens of one sequence in turn; lane l holds the experts l, l + 32,
// ... in registers. A block writes its share of the sequence's sums, and a second kernel adds the shares in order, so
// that no sum depends on which block came first.
#pragma once

#include <type_traits>

#include "common.cuh"

namespace moescale::cuda {

constexpr int kRouteWarps = 4;
constexpr int kRouteThreads = kRouteWarps * kWarp;
constexpr int kTokensPerWarp = 8;
constexpr int64_t kTokensPerBlock = kRouteWarps * kTokensPerWarp;

/// Keeps a sum of scores that all underflowed from dividing by zero.
constexpr float kTiny = 1e-20f;

struct RouteShape {
  int64_t tokens;
  int sequences;
  bool batch_first;
  int experts;
  int active;
};

struct ScoreRule {
  bool sigmoid;
  bool normalized;
  float scale;
};

/// `bias_E`, `allowed_TE` and `mask_T` may be null.
struct RouteInput {
  const float* logits_TE;
  const float* bias_E;
  const bool* allowed_TE;
  const bool* mask_T;
};

struct RouteOutput {
  float* weight_TK;
  int64_t* index_TK;
  float* logsumexp_T;
  float* entropy_T;
};

/// Sums of blocks: `[B, C, E]` for C blocks a sequence.
struct RouteShares {
  float* scored_BCE;
  int* visits_BCE;
  int per_sequence;
};

__host__ __device__ inline int64_t tokens_of_sequence(const RouteShape& shape) {
  return ceil_div<int64_t>(shape.tokens, shape.sequences);
}

/// The token at a position of a sequence; may lie beyond the last token.
__device__ __forceinline__ int64_t token_at(const RouteShape& shape, int sequence, int64_t position) {
  return shape.batch_first ? sequence * tokens_of_sequence(shape) + position : position * shape.sequences + sequence;
}

__device__ __forceinline__ int sequence_of(const RouteShape& shape, int64_t token) {
  return static_cast<int>(shape.batch_first ? token / tokens_of_sequence(shape) : token % shape.sequences);
}

__device__ __forceinline__ float score_of(float logit, float logsumexp, bool sigmoid) {
  return sigmoid ? 1.0f / (1.0f + expf(-logit)) : expf(logit - logsumexp);
}

/// An integer that orders floats as they are ordered; 0 for NaN, and for nothing else.
__device__ __forceinline__ unsigned sort_key(float value) {
  if (isnan(value)) return 0;
  const unsigned bits = __float_as_uint(value);
  return bits ^ ((bits >> 31) != 0 ? 0xffffffffu : 0x80000000u);
}

/// A token's experts in the registers of a warp: slot j of lane l is expert 32 j + l.
template <int kPerLane>
struct TokenScores {
  float score[kPerLane];
  float logsumexp;
  float sum;  // of all scores

  __device__ __forceinline__ void load(const float* logits_E, int experts, bool sigmoid) {
    float highest = -INFINITY;
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      const int expert = j * kWarp + lane_index();
      score[j] = expert < experts ? logits_E[expert] : -INFINITY;
      highest = fmaxf(highest, score[j]);
    }
    highest = warp_max(highest);
    const float shift = isinf(highest) ? 0.0f : highest;
    float exponentials = 0.0f;
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) exponentials += expf(score[j] - shift);
    logsumexp = shift + logf(warp_sum(exponentials));
    sum = 0.0f;
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      score[j] = score_of(score[j], logsumexp, sigmoid);
      if (j * kWarp + lane_index() < experts) sum += score[j];
    }
    sum = warp_sum(sum);
  }

  /// The probability in a slot: the softmax, or the sigmoid's share of its sum.
  __device__ __forceinline__ float probability(int slot, bool sigmoid) const {
    return sigmoid ? score[slot] / (sum + kTiny) : score[slot];
  }
};

/// The visits of a token: lane k holds the k-th.
struct Selection {
  int expert = -1;
  float score = 0.0f;
  float sum = 0.0f;  // of the selected scores, in the order of k
};

/// Takes the expert of the highest score + bias, `active` times; the lower expert of equals. Experts that are not
/// allowed or whose score is NaN are never taken.
template <int kPerLane>
__device__ __forceinline__ Selection select_experts(const TokenScores<kPerLane>& scores, const RouteInput& input,
                                                    int64_t token, const RouteShape& shape) {
  unsigned key[kPerLane];
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    const int expert = j * kWarp + lane_index();
    const bool open = expert < shape.experts &&
                      (input.allowed_TE == nullptr || input.allowed_TE[token * shape.experts + expert]);
    const float bias = open && input.bias_E != nullptr ? input.bias_E[expert] : 0.0f;
    key[j] = open ? sort_key(scores.score[j] + bias) : 0;
  }
  Selection selection;
  for (int k = 0; k < shape.active; ++k) {
    unsigned best = 0;
    unsigned candidate = kMaxExperts;
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      if (key[j] <= best) continue;
      best = key[j];
      candidate = j * kWarp + lane_index();
    }
    const unsigned top = __reduce_max_sync(kAllLanes, best);
    if (top == 0) break;
    const int winner = __reduce_min_sync(kAllLanes, best == top ? candidate : kMaxExperts);
    float score = 0.0f;
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      if (j * kWarp + lane_index() != winner) continue;
      score = scores.score[j];
      key[j] = 0;
    }
    score = __shfl_sync(kAllLanes, score, winner % kWarp);
    selection.sum += score;
    if (lane_index() == k) {
      selection.expert = winner;
      selection.score = score;
    }
  }
  return selection;
}

/// Writes a token's visits; lane k has the k-th.
__device__ __forceinline__ void write_visits(const RouteOutput& output, int64_t token, const RouteShape& shape,
                                             const ScoreRule& rule, const Selection& selection) {
  const int k = lane_index();
  if (k >= shape.active) return;
  const float weight = rule.normalized ? selection.score / (selection.sum + kTiny) : selection.score;
  output.weight_TK[token * shape.active + k] = weight * rule.scale;
  output.index_TK[token * shape.active + k] = selection.expert;
}

__device__ __forceinline__ void write_scalars(const RouteOutput& output, int64_t token, float logsumexp,
                                              float entropy) {
  if (lane_index() != 0) return;
  output.logsumexp_T[token] = logsumexp;
  output.entropy_T[token] = entropy;
}

/// One block takes kTokensPerBlock consecutive positions of one sequence; E <= 32 * kPerLane.
template <int kPerLane>
__global__ void __launch_bounds__(kRouteThreads)
    route_kernel(RouteInput input, RouteShape shape, ScoreRule rule, RouteOutput output, RouteShares shares) {
  float* const scored = reinterpret_cast<float*>(shared_memory());                    // [warps, E]
  int* const visited = reinterpret_cast<int*>(scored + kRouteWarps * shape.experts);  // [E]
  for (int expert = threadIdx.x; expert < shape.experts; expert += kRouteThreads) visited[expert] = 0;
  __syncthreads();

  const int sequence = static_cast<int>(blockIdx.x) / shares.per_sequence;
  const int share = static_cast<int>(blockIdx.x) % shares.per_sequence;
  const int64_t first = share * kTokensPerBlock + warp_index() * kTokensPerWarp;
  const int64_t last = min(first + kTokensPerWarp, tokens_of_sequence(shape));
  float scored_of_lane[kPerLane] = {};
  for (int64_t position = first; position < last; ++position) {
    const int64_t token = token_at(shape, sequence, position);
    if (token >= shape.tokens) break;
    if (input.mask_T != nullptr && !input.mask_T[token]) {
      write_visits(output, token, shape, rule, Selection());
      write_scalars(output, token, 0.0f, 0.0f);
      continue;
    }
    TokenScores<kPerLane> scores;
    scores.load(input.logits_TE + token * shape.experts, shape.experts, rule.sigmoid);
    const Selection selection = select_experts(scores, input, token, shape);
    write_visits(output, token, shape, rule, selection);
    if (selection.expert >= 0) atomicAdd(visited + selection.expert, 1);

    float entropy = 0.0f;
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      const float p = scores.probability(j, rule.sigmoid);
      scored_of_lane[j] += p;
      if (j * kWarp + lane_index() < shape.experts && p != 0.0f) entropy -= p * logf(p);
    }
    write_scalars(output, token, scores.logsumexp, warp_sum(entropy));
  }

#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    const int expert = j * kWarp + lane_index();
    if (expert < shape.experts) scored[warp_index() * shape.experts + expert] = scored_of_lane[j];
  }
  __syncthreads();
  for (int expert = threadIdx.x; expert < shape.experts; expert += kRouteThreads) {
    float sum = 0.0f;
    for (int warp = 0; warp < kRouteWarps; ++warp) sum += scored[warp * shape.experts + expert];
    const int64_t cell = static_cast<int64_t>(blockIdx.x) * shape.experts + expert;
    shares.scored_BCE[cell] = sum;
    shares.visits_BCE[cell] = visited[expert];
  }
}

/// One block adds the shares of 32 experts of one sequence: a warp every eighth share, then the warps in order.
static __global__ void __launch_bounds__(kThreads)
    add_shares_kernel(RouteShares shares, RouteShape shape, float* __restrict__ scored_BE,
                      float* __restrict__ visits_BE) {
  float* const scored = reinterpret_cast<float*>(shared_memory());  // [warps, 32]
  int* const visited = reinterpret_cast<int*>(scored + kThreads);   // [warps, 32]
  const int tiles = ceil_div(shape.experts, kWarp);
  const int64_t sequence = static_cast<int>(blockIdx.x) / tiles;
  const int expert = static_cast<int>(blockIdx.x) % tiles * kWarp + lane_index();
  const bool exists = expert < shape.experts;

  float sum = 0.0f;
  int visits = 0;
#pragma unroll 4
  for (int share = warp_index(); exists && share < shares.per_sequence; share += kWarpsPerBlock) {
    const int64_t cell = (sequence * shares.per_sequence + share) * shape.experts + expert;
    sum += shares.scored_BCE[cell];
    visits += shares.visits_BCE[cell];
  }
  scored[threadIdx.x] = sum;
  visited[threadIdx.x] = visits;
  __syncthreads();
  if (warp_index() > 0 || !exists) return;
  for (int warp = 1; warp < kWarpsPerBlock; ++warp) {
    sum += scored[warp * kWarp + lane_index()];
    visits += visited[warp * kWarp + lane_index()];
  }
  scored_BE[sequence * shape.experts + expert] = sum;
  visits_BE[sequence * shape.experts + expert] = static_cast<float>(visits);
}

/// Blocks for each sequence, at least one, so that the sums of no tokens are written too.
inline int route_shares(const RouteShape& shape) {
  const int64_t blocks = ceil_div(tokens_of_sequence(shape), kTokensPerBlock);
  return static_cast<int>(blocks > 0 ? blocks : 1);
}

/// `shares` holds sequences * per_sequence * experts elements each, per_sequence being route_shares(shape).
static inline void launch_route(const RouteInput& input, const RouteShape& shape, const ScoreRule& rule,
                                const RouteOutput& output, const RouteShares& shares, float* scored_BE,
                                float* visits_BE, cudaStream_t stream) {
  const unsigned blocks = shape.sequences * shares.per_sequence;
  const size_t shared_bytes = (kRouteWarps + 1) * shape.experts * sizeof(float);
  const auto launch = [&](auto per_lane) {
    MOESCALE_LAUNCH(route_kernel<decltype(per_lane)::value>, blocks, kRouteThreads, shared_bytes, stream, input, shape,
                    rule, output, shares);
  };
  if (shape.experts <= 32) launch(std::integral_constant<int, 1>());
  else if (shape.experts <= 64) launch(std::integral_constant<int, 2>());
  else if (shape.experts <= 128) launch(std::integral_constant<int, 4>());
  else if (shape.experts <= 256) launch(std::integral_constant<int, 8>());
  else if (shape.experts <= 512) launch(std::integral_constant<int, 16>());
  else launch(std::integral_constant<int, 32>());
  MOESCALE_LAUNCH(add_shares_kernel, shape.sequences * ceil_div(shape.experts, kWarp), kThreads,
                  kThreads * (sizeof(float) + sizeof(int)), stream, shares, shape, scored_BE, visits_BE);
}

}  // namespace moescale::cuda
