#include <tuple>
#include <vector>

#include "tensors.h"

namespace moescale {

namespace {

// A counting sort of the visits by expert: three passes over T * K integers, no row is touched. One thread suffices:
// the rows that are moved afterwards are hundreds of times larger.
struct Rows {
  const int64_t* expert_of_visit;
  int64_t visits, experts, multiple, limit;

  bool legal(int64_t visit) const { return expert_of_visit[visit] >= 0 && expert_of_visit[visit] < experts; }

  void count(int64_t* counts_E) const {
    std::fill_n(counts_E, experts, int64_t{0});
    for (int64_t v = 0; v < visits; ++v) {
      if (legal(v)) ++counts_E[expert_of_visit[v]];
    }
    for (int64_t e = 0; e < experts; ++e) {
      counts_E[e] = limit >= 0 ? limit : (counts_E[e] + multiple - 1) / multiple * multiple;
    }
  }

  // next_E: the next free row of each expert.
  void place(const int64_t* counts_E, const int32_t* ends_E, int64_t* visit_R, int64_t* row_TK) const {
    std::vector<int64_t> next_E(experts);
    for (int64_t e = 0; e < experts; ++e) next_E[e] = ends_E[e] - counts_E[e];
    for (int64_t v = 0; v < visits; ++v) {
      row_TK[v] = -1;
      if (!legal(v) || next_E[expert_of_visit[v]] == ends_E[expert_of_visit[v]]) continue;
      row_TK[v] = next_E[expert_of_visit[v]]++;
      visit_R[row_TK[v]] = v;
    }
  }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> assign(const Tensor& index_TK, int64_t experts, int64_t multiple,
                                                  int64_t limit) {
  const Rows plan{elements<int64_t>(index_TK, "index_TK"), index_TK.numel(), experts, multiple, limit};
  STD_TORCH_CHECK(multiple >= 1, "multiple must be at least 1");
  STD_TORCH_CHECK(limit < 0 || limit % multiple == 0, "limit must be a multiple of multiple");
  const int64_t rows = limit < 0 ? plan.visits + experts * (multiple - 1) : experts * limit;
  STD_TORCH_CHECK(rows <= INT32_MAX, "more than 2^31 - 1 rows on one rank: grouped products index them by 32 bits");
  Tensor counts_E = torch::stable::new_empty(index_TK, {experts});
  Tensor ends_E = torch::stable::new_empty(index_TK, {experts}, ScalarType::Int);
  Tensor visit_R = torch::stable::new_empty(index_TK, {rows});
  Tensor row_TK = torch::stable::new_empty(index_TK, {index_TK.size(0), index_TK.size(1)});
  int64_t *counts = elements<int64_t>(counts_E, "counts_E"), *visit_of_row = elements<int64_t>(visit_R, "visit_R");
  int32_t* ends = elements<int32_t>(ends_E, "ends_E");
  plan.count(counts);
  int64_t end = 0;
  for (int64_t e = 0; e < experts; ++e) ends[e] = static_cast<int32_t>(end += counts[e]);
  std::fill_n(visit_of_row, rows, int64_t{-1});
  plan.place(counts, ends, visit_of_row, elements<int64_t>(row_TK, "row_TK"));
  return {counts_E, ends_E, visit_R, row_TK};
}

}  // namespace moescale

STABLE_TORCH_LIBRARY_IMPL(moescale, CPU, library) { library.impl("assign", TORCH_BOX(&moescale::assign)); }
