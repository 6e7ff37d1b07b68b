"""From tokens to rows ordered by expert, and back.

`Assignment` is the plan: visits sorted by expert, ties in token order, so it is deterministic. `permute` gathers the
rows, `combine` takes the weighted sum of each token's K rows. Both have hand-written backward passes, because the
automatic ones scatter-add where a gather suffices: every token owns exactly K rows.
"""

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Assignment:
    """Where each visit goes.

    Attributes:
        counts_E: rows of each expert, int64.
        token_R: the token of each row; rows are ordered by expert, then by token.
        row_TK: the row of each visit: the inverse.
    """

    counts_E: Tensor
    token_R: Tensor
    row_TK: Tensor

    @classmethod
    def build(cls, index_TK: Tensor, experts: int) -> Self:
        """The plan for the experts that each token visits."""
        visit_R = torch.argsort(index_TK.flatten(), stable=True)
        row_of_visit = torch.empty_like(visit_R)
        row_of_visit[visit_R] = torch.arange(visit_R.numel(), device=visit_R.device)
        return cls(
            counts_E=torch.bincount(index_TK.flatten(), minlength=experts),
            token_R=visit_R // index_TK.shape[1],
            row_TK=row_of_visit.view_as(index_TK),
        )


def permute(x_TD: Tensor, assignment: Assignment) -> Tensor:
    """Rows ordered by expert: ``[T, D] -> [R, D]``."""
    return _Permute.apply(x_TD, assignment.token_R, assignment.row_TK)


def combine(rows_RD: Tensor, weight_TK: Tensor, assignment: Assignment) -> Tensor:
    """Weighted sum of each token's rows, in the dtype of the rows: ``[R, D], [T, K] -> [T, D]``."""
    return _Combine.apply(rows_RD, weight_TK, assignment.token_R, assignment.row_TK)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, token_R: Tensor, row_TK: Tensor) -> Tensor:
        ctx.save_for_backward(row_TK)
        return x_TD.index_select(0, token_R)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (row_TK,) = ctx.saved_tensors
        gradient_TKD = gradients[0].index_select(0, row_TK.flatten()).view(*row_TK.shape, gradients[0].shape[1])
        return gradient_TKD.sum(dim=1), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, weight_TK: Tensor, token_R: Tensor, row_TK: Tensor) -> Tensor:
        ctx.save_for_backward(rows_RD, weight_TK, token_R, row_TK)
        rows_TKD = rows_RD.index_select(0, row_TK.flatten()).view(*row_TK.shape, rows_RD.shape[1])
        return torch.bmm(weight_TK.to(rows_RD.dtype).unsqueeze(1), rows_TKD).squeeze(1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows_RD, weight_TK, token_R, row_TK = ctx.saved_tensors
        gradient_RD = gradients[0].index_select(0, token_R)
        weight_of_row = torch.empty(token_R.shape[0], dtype=weight_TK.dtype, device=weight_TK.device)
        weight_of_row[row_TK.flatten()] = weight_TK.flatten()
        gradient_of_weight_R = (gradient_RD * rows_RD).sum(dim=-1, dtype=weight_TK.dtype)
        gradient_of_rows = gradient_RD * weight_of_row.to(gradient_RD.dtype).unsqueeze(-1)
        return gradient_of_rows, gradient_of_weight_R[row_TK], None, None
