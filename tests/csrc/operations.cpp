// The shipped kernels and launchers, run on the emulator: `operations FOLDER operation=N dtype=N seed=N ...`.
#include "arguments.h"
#include "assign.cuh"
#include "combine.cuh"
#include "permute.cuh"
#include "route_backward.cuh"
#include "swiglu.cuh"

namespace moescale::cuda {
namespace {

RouteShape route_shape(const Arguments& a) {
  return {a.integer("tokens"), static_cast<int>(a.integer("sequences")), a.integer("batch_first") != 0,
          static_cast<int>(a.integer("experts")), static_cast<int>(a.integer("active"))};
}

ScoreRule score_rule(const Arguments& a) {
  return {a.integer("sigmoid") != 0, a.integer("normalized") != 0, static_cast<float>(a.number("scale"))};
}

void run_route(Arguments& a) {
  const RouteShape shape = route_shape(a);
  const int64_t visits = shape.tokens * shape.active;
  const int64_t cells = static_cast<int64_t>(shape.sequences) * shape.experts;
  const int per_sequence = route_shares(shape);
  const RouteShares shares{a.scratch<float>(cells * per_sequence), a.scratch<int>(cells * per_sequence), per_sequence};
  launch_route({a.input<float>("logits_TE"), a.input<float>("bias_E"), a.input<bool>("allowed_TE"),
                a.input<bool>("mask_T")},
               shape, score_rule(a),
               {a.output<float>("weight_TK", visits), a.output<int64_t>("index_TK", visits),
                a.output<float>("logsumexp_T", shape.tokens), a.output<float>("entropy_T", shape.tokens)},
               shares, a.output<float>("scored_BE", cells), a.output<float>("visits_BE", cells), nullptr);
}

void run_route_backward(Arguments& a) {
  const RouteShape shape = route_shape(a);
  launch_route_backward(
      {a.input<float>("grad_weight_TK"), a.input<float>("grad_logsumexp_T"), a.input<float>("grad_scored_BE")},
      {a.input<float>("logits_TE"), a.input<int64_t>("index_TK"), a.input<float>("logsumexp_T"),
       a.input<bool>("mask_T")},
      shape, score_rule(a), a.output<float>("grad_logits_TE", shape.tokens * shape.experts), nullptr);
}

void run_assign(Arguments& a) {
  const int64_t visits = a.integer("tokens") * a.integer("active");
  const int experts = static_cast<int>(a.integer("experts"));
  const int64_t rows = a.integer("rows");
  launch_assign(a.input<int64_t>("index_TK"), visits, experts, static_cast<int>(a.integer("multiple")),
                static_cast<int>(a.integer("limit")), a.scratch<int>(assign_scratch(visits, experts)),
                a.output<int64_t>("counts_E", experts), a.output<int>("ends_E", experts),
                a.output<int64_t>("visit_R", rows), a.output<int64_t>("row_TK", visits), rows, nullptr);
}

template <typename T>
void run_permute(Arguments& a) {
  const int64_t rows = a.integer("rows");
  const int64_t width = a.integer("width");
  launch_permute(a.input<T>("x_TD"), a.input<int64_t>("visit_R"), a.input<int64_t>("row_TK"),
                 a.output<T>("rows_RD", rows * width), rows, a.integer("tokens"), static_cast<int>(a.integer("active")), width * sizeof(T), nullptr);
}

template <typename T>
void run_combine(Arguments& a) {
  const int64_t tokens = a.integer("tokens");
  const int64_t width = a.integer("width");
  launch_combine<T>(a.input<T>("rows_RD"), a.input<int64_t>("row_TK"), a.input<float>("weight_TK"),
                    a.output<T>("out_TD", tokens * width), a.integer("rows"), tokens,
                    static_cast<int>(a.integer("active")), width, nullptr);
}

template <typename T>
void run_combine_backward(Arguments& a) {
  const int64_t tokens = a.integer("tokens");
  const int64_t active = a.integer("active");
  const int64_t rows = a.integer("rows");
  const int64_t width = a.integer("width");
  launch_combine_backward<T>(a.input<T>("grad_TD"), a.input<T>("rows_RD"), a.input<int64_t>("visit_R"),
                             a.input<float>("weight_TK"), a.output<T>("grad_rows_RD", rows * width),
                             a.output<float>("grad_weight_TK", tokens * active, true), rows, tokens,
                             static_cast<int>(active), width, nullptr);
}

RowWeights row_weights(Arguments& a) {
  return {a.input<float>("weight_TK"), a.input<int64_t>("visit_R"), a.integer("tokens") * a.integer("active")};
}

template <typename T>
void run_swiglu(Arguments& a) {
  const int64_t rows = a.integer("rows");
  const int64_t width = a.integer("width");
  launch_swiglu<T>(a.input<T>("gate_up"), row_weights(a), a.output<T>("act_RF", rows * width), rows, width, nullptr);
}

template <typename T>
void run_swiglu_backward(Arguments& a) {
  const int64_t rows = a.integer("rows");
  const int64_t width = a.integer("width");
  launch_swiglu_backward<T>(a.overwritten<T>("grad_act_RF", rows * width), a.input<T>("gate_up"), row_weights(a),
                            a.output<T>("grad_gate_up", rows * 2 * width),
                            a.output<float>("grad_weight_TK", a.integer("tokens") * a.integer("active"), true), rows,
                            width, nullptr);
}

template <typename T>
void run(Arguments& a) {
  switch (a.integer("operation")) {
    case 0: return run_route(a);
    case 1: return run_route_backward(a);
    case 2: return run_assign(a);
    case 3: return run_permute<T>(a);
    case 4: return run_combine<T>(a);
    case 5: return run_combine_backward<T>(a);
    case 6: return run_swiglu<T>(a);
    case 7: return run_swiglu_backward<T>(a);
    default: std::abort();
  }
}

}  // namespace
}  // namespace moescale::cuda

int main(int count, char** values) {
  Arguments arguments(count, values);
  switch (arguments.integer("dtype")) {
    case 0: moescale::cuda::run<float>(arguments); break;
    case 1: moescale::cuda::run<__half>(arguments); break;
    case 2: moescale::cuda::run<__nv_bfloat16>(arguments); break;
    default: std::abort();
  }
  return 0;
}
