"""The native operations in plain torch: what csrc/ must agree with, and what runs where csrc/ was not built.

Shapes are DESIGN's: T tokens, D width, F expert width, E experts, K visits a token, R rows after permutation, B
sequences. ``-1`` means "nothing here" in every index. Sums are taken in float32 (float64 for float64 inputs).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

TINY = 1e-20  # keeps a sum of scores that all underflowed from dividing by zero


def sequence_of_token(tokens: int, sequences: int, batch_first: bool, device: torch.device) -> Tensor:
    """Index of each token's sequence, ``[T]``; tokens are ordered ``[S, B]``, or ``[B, S]`` with ``batch_first``."""
    index_T = torch.arange(tokens, device=device)
    return index_T // max(tokens // sequences, 1) if batch_first else index_T % sequences


def probabilities(logits_TE: Tensor, logsumexp_T: Tensor, sigmoid: bool) -> tuple[Tensor, Tensor]:
    """(scores s, probabilities p): softmax twice, or the sigmoid and its share of the token's sum."""
    if not sigmoid:
        probs_TE = torch.exp(logits_TE - logsumexp_T.unsqueeze(-1))
        return probs_TE, probs_TE
    scores_TE = torch.sigmoid(logits_TE)
    return scores_TE, scores_TE / (scores_TE.sum(dim=-1, keepdim=True) + TINY)


def route(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    allowed_TE: Tensor | None,
    mask_T: Tensor | None,
    sequences: int,
    batch_first: bool,
    active: int,
    sigmoid: bool,
    normalized: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Scores, the K best experts of each token, and what balancing needs; see `moescale.moe.ops.route`."""
    tokens, experts = logits_TE.shape
    real_T = torch.ones(tokens, dtype=torch.bool, device=logits_TE.device) if mask_T is None else mask_T
    logsumexp_T = torch.logsumexp(logits_TE, dim=-1)
    scores_TE, probs_TE = probabilities(logits_TE, logsumexp_T, sigmoid)

    wanted_TE = scores_TE if bias_E is None else scores_TE + bias_E
    forbidden_TE = wanted_TE.isnan() if allowed_TE is None else wanted_TE.isnan() | ~allowed_TE
    ordered = torch.sort(wanted_TE.masked_fill(forbidden_TE, -torch.inf), dim=-1, descending=True, stable=True)
    index_TK = ordered.indices[:, :active]
    chosen_TK = ~forbidden_TE.gather(1, index_TK) & real_T.unsqueeze(-1)
    weight_TK = scores_TE.gather(1, index_TK).masked_fill(~chosen_TK, 0)
    if normalized:
        weight_TK = weight_TK / (weight_TK.sum(dim=-1, keepdim=True) + TINY)
    index_TK = index_TK.masked_fill(~chosen_TK, -1)

    entropy_T = -torch.special.xlogy(probs_TE, probs_TE).sum(dim=-1)
    sequence_T = sequence_of_token(tokens, sequences, batch_first, logits_TE.device)
    scored_BE = logits_TE.new_zeros(sequences, experts)
    scored_BE.index_add_(0, sequence_T, probs_TE.masked_fill(~real_T.unsqueeze(-1), 0))
    cell_TK = sequence_T.unsqueeze(-1) * experts + index_TK
    visits = torch.bincount(cell_TK[chosen_TK], minlength=sequences * experts)
    visits_BE = visits.view(sequences, experts).to(logits_TE.dtype)
    dropped_T = ~real_T
    return (
        weight_TK * scale,
        index_TK,
        logsumexp_T.masked_fill(dropped_T, 0),
        scored_BE,
        visits_BE,
        entropy_T.masked_fill(dropped_T, 0),
    )


def route_backward(
    grad_weight_TK: Tensor,
    grad_logsumexp_T: Tensor,
    grad_scored_BE: Tensor,
    logits_TE: Tensor,
    index_TK: Tensor,
    logsumexp_T: Tensor,
    mask_T: Tensor | None,
    batch_first: bool,
    sigmoid: bool,
    normalized: bool,
    scale: float,
) -> Tensor:
    """Gradient of the logits; the chosen experts are constants."""
    chosen_TK = index_TK >= 0
    logsumexp_T = torch.logsumexp(logits_TE, dim=-1) if mask_T is not None else logsumexp_T
    scores_TE, probs_TE = probabilities(logits_TE, logsumexp_T, sigmoid)
    selected_TK = scores_TE.gather(1, index_TK.clamp(min=0)).masked_fill(~chosen_TK, 0)
    grad_selected_TK = grad_weight_TK.masked_fill(~chosen_TK, 0) * scale
    if normalized:
        total_T1 = selected_TK.sum(dim=-1, keepdim=True) + TINY
        mean_T1 = (grad_selected_TK * selected_TK).sum(dim=-1, keepdim=True) / total_T1
        grad_selected_TK = ((grad_selected_TK - mean_T1) / total_T1).masked_fill(~chosen_TK, 0)
    grad_scores_TE = torch.zeros_like(logits_TE).scatter_add_(1, index_TK.clamp(min=0), grad_selected_TK)

    sequence_T = sequence_of_token(len(logits_TE), len(grad_scored_BE), batch_first, logits_TE.device)
    grad_probs_TE = grad_scored_BE[sequence_T]
    softmax_TE = torch.exp(logits_TE - logsumexp_T.unsqueeze(-1))
    grad_TE = grad_logsumexp_T.unsqueeze(-1) * softmax_TE
    if sigmoid:
        total_T1 = scores_TE.sum(dim=-1, keepdim=True) + TINY
        grad_scores_TE += (grad_probs_TE - (grad_probs_TE * probs_TE).sum(dim=-1, keepdim=True)) / total_T1
        grad_TE += grad_scores_TE * scores_TE * (1 - scores_TE)
    else:
        grad_scores_TE += grad_probs_TE
        grad_TE += probs_TE * (grad_scores_TE - (grad_scores_TE * probs_TE).sum(dim=-1, keepdim=True))
    return grad_TE if mask_T is None else grad_TE.masked_fill(~mask_T.unsqueeze(-1), 0)


def assign(index_TK: Tensor, experts: int, multiple: int, limit: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(counts_E, ends_E, visit_R, row_TK): rows ordered by expert, then by visit; see `moescale.moe.ops.assign`."""
    expert_V = index_TK.flatten()
    legal_V = (expert_V >= 0) & (expert_V < experts)
    # Visits of no expert are sorted behind all others, as those of one expert more.
    ordered_V, visit_V = torch.sort(expert_V.masked_fill(~legal_V, experts), stable=True)
    visits_E = torch.bincount(ordered_V, minlength=experts + 1)[:experts]
    if limit < 0:
        counts_E = (visits_E + multiple - 1) // multiple * multiple
        rows = expert_V.numel() + experts * (multiple - 1)
    else:
        counts_E = torch.full_like(visits_E, limit)
        rows = experts * limit
    ends_E = counts_E.cumsum(0)
    # A visit's row: where its expert's rows begin, and its place among the expert's visits.
    begins_E = F.pad(ends_E - counts_E, (0, 1))
    first_visit_E = F.pad(visits_E.cumsum(0) - visits_E, (0, 1))
    place_V = torch.arange(expert_V.numel(), device=expert_V.device) - first_visit_E[ordered_V]
    served_V = (ordered_V < experts) & (place_V < F.pad(counts_E, (0, 1))[ordered_V])
    row_V = begins_E[ordered_V] + place_V
    visit_R = visit_V.new_full((rows,), -1)
    visit_R[row_V[served_V]] = visit_V[served_V]
    row_TK = torch.empty_like(expert_V)
    row_TK[visit_V] = row_V.masked_fill(~served_V, -1)
    return counts_E, ends_E.to(torch.int32), visit_R, row_TK.view_as(index_TK)


def permute(x_TD: Tensor, visit_R: Tensor, row_TK: Tensor) -> Tensor:
    """The row of each visit's token, zeros where there is no visit: ``[R, D]``."""
    return _gather(x_TD, visit_R, row_TK.shape[1])


def _gather(x_TD: Tensor, visit_R: Tensor, active: int) -> Tensor:
    if x_TD.shape[0] == 0:
        return x_TD.new_zeros(visit_R.shape[0], x_TD.shape[1])
    rows_RD = x_TD.index_select(0, visit_R.clamp(min=0) // active)
    return rows_RD.masked_fill_((visit_R < 0).unsqueeze(-1), 0)


def combine(rows_RD: Tensor, row_TK: Tensor, weight_TK: Tensor | None) -> Tensor:
    """(Weighted) sum of each token's rows, in the rows' dtype: ``[T, D]``."""
    if row_TK.numel() == 0 or rows_RD.shape[0] == 0:
        return rows_RD.new_zeros(row_TK.shape[0], rows_RD.shape[1])
    visited_TK = row_TK >= 0
    wide = torch.promote_types(rows_RD.dtype, torch.float32)
    factor_TK = visited_TK.to(wide) if weight_TK is None else weight_TK.to(wide).masked_fill(~visited_TK, 0)
    taken_TKD = rows_RD[row_TK.clamp(min=0)].to(wide).masked_fill(~visited_TK.unsqueeze(-1), 0)
    return (taken_TKD * factor_TK.unsqueeze(-1)).sum(dim=1).to(rows_RD.dtype)


def combine_backward(grad_TD: Tensor, rows_RD: Tensor, visit_R: Tensor, weight_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the rows and of the weights."""
    wide = weight_TK.dtype
    gathered_RD = _gather(grad_TD, visit_R, weight_TK.shape[1]).to(wide)
    weight_R = _of_rows(weight_TK, visit_R)
    grad_weight = weight_TK.new_zeros(weight_TK.numel())
    visited_R = visit_R >= 0
    dots_R = (gathered_RD * rows_RD.to(wide)).sum(dim=-1)
    grad_weight[visit_R[visited_R]] = dots_R[visited_R]
    return (gathered_RD * weight_R.unsqueeze(-1)).to(rows_RD.dtype), grad_weight.view_as(weight_TK)


def swiglu(gate_up: Tensor, weight_TK: Tensor | None, visit_R: Tensor | None) -> Tensor:
    """``silu(gate) * up``, times the weight of the row's visit if weights are given: ``[R, 2F] -> [R, F]``."""
    wide = torch.promote_types(gate_up.dtype, torch.float32)
    gate_RF, up_RF = gate_up.to(wide).chunk(2, dim=-1)
    act_RF = F.silu(gate_RF) * up_RF
    if weight_TK is not None and visit_R is not None:
        act_RF = (act_RF * _of_rows(weight_TK, visit_R).unsqueeze(-1)).masked_fill((visit_R < 0).unsqueeze(-1), 0)
    return act_RF.to(gate_up.dtype)


def swiglu_backward(
    grad_act_RF: Tensor, gate_up: Tensor, weight_TK: Tensor | None, visit_R: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(gradient of ``gate_up``, of ``weight_TK``); overwrites ``grad_act_RF`` with `swiglu`'s result."""
    wide = torch.promote_types(gate_up.dtype, torch.float32)
    gate_RF, up_RF = gate_up.to(wide).chunk(2, dim=-1)
    grad_RF = grad_act_RF.to(wide)
    sigmoid_RF = torch.sigmoid(gate_RF)
    silu_RF = gate_RF * sigmoid_RF
    grad_weight = gate_up.new_empty(0, dtype=wide)
    if weight_TK is not None and visit_R is not None:
        visited_R = visit_R >= 0
        grad_weight = weight_TK.new_zeros(weight_TK.numel())
        grad_weight[visit_R[visited_R]] = (grad_RF * silu_RF * up_RF).sum(dim=-1)[visited_R].to(weight_TK.dtype)
        grad_weight = grad_weight.view_as(weight_TK)
        grad_RF = (grad_RF * _of_rows(weight_TK, visit_R).unsqueeze(-1)).masked_fill(~visited_R.unsqueeze(-1), 0)
    grad_gate_RF = grad_RF * up_RF * sigmoid_RF * (1 + gate_RF * (1 - sigmoid_RF))
    grad_gate_up = torch.cat([grad_gate_RF, grad_RF * silu_RF], dim=-1).to(gate_up.dtype)
    if visit_R is not None:  # a row that only fills up may hold anything, NaN included
        grad_gate_up.masked_fill_((visit_R < 0).unsqueeze(-1), 0)
    grad_act_RF.copy_(swiglu(gate_up, weight_TK, visit_R))
    return grad_gate_up, grad_weight


def _of_rows(weight_TK: Tensor, visit_R: Tensor) -> Tensor:
    """Each row's weight, 0 where a row has no visit."""
    if weight_TK.numel() == 0:
        return weight_TK.new_zeros(visit_R.shape[0])
    return weight_TK.flatten()[visit_R.clamp(min=0)].masked_fill(visit_R < 0, 0)
