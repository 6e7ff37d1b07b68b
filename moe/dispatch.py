"""From tokens to rows ordered by expert, and back.

`Assignment` is the plan: visits sorted by expert, ties in token order, so it is deterministic. `permute` gathers the
rows, `combine` sums each token's rows. Each is the other's backward pass: every visit owns one row, so that a gather
suffices where automatic differentiation would scatter and add.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import ops


@dataclass(frozen=True)
class Assignment:
    """Where each visit goes. A visit's number is ``t * K + k``.

    Attributes:
        counts_E: rows of each expert, int64, those that only fill up included.
        ends_E: where each expert's rows end, int32.
        visit_R: the visit of each row; rows are ordered by expert, then by visit. -1 where a row only fills up.
        row_TK: the row of each visit, -1 where no expert serves it.
    """

    counts_E: Tensor
    ends_E: Tensor
    visit_R: Tensor
    row_TK: Tensor

    @classmethod
    def build(cls, index_TK: Tensor, experts: int, *, multiple: int = 1, limit: int | None = None) -> Self:
        """The plan for the experts that each token visits.

        Args:
            multiple: each expert's rows are rounded up to it.
            limit: None gives each expert as many rows as it has visits. A number gives each exactly that many, a
                multiple of ``multiple``, and drops the visits behind them: sizes then depend on no count.

        On a GPU the rows are not counted, since that would wait for the device: ``visit_R`` is as long as it could
        become, with -1 behind the last row.
        """
        counts_E, ends_E, visit_R, row_TK = ops.assign(
            index_TK.contiguous(), experts, multiple, -1 if limit is None else limit
        )
        if limit is None and visit_R.device.type == "cpu":
            visit_R = visit_R[: int(ends_E[-1])]
        return cls(counts_E, ends_E, visit_R, row_TK)

    @classmethod
    def even(cls, experts: int, rows: int, device: torch.device) -> Self:
        """Rows that lie ordered by expert already, as many for each."""
        counts_E = torch.full((experts,), rows, device=device)
        row_R = torch.arange(experts * rows, device=device)
        return cls(counts_E, counts_E.cumsum(0).to(torch.int32), row_R, row_R.unsqueeze(-1))

    def cut(self, rows: int) -> Self:
        """The same plan once the host knows how many rows there are."""
        return dataclasses.replace(self, visit_R=self.visit_R[:rows])


def permute(x_TD: Tensor, assignment: Assignment) -> Tensor:
    """Rows ordered by expert, zeros where a row only fills up: ``[T, D] -> [R, D]``."""
    return _Permute.apply(x_TD, assignment.visit_R, assignment.row_TK)


def combine(rows_RD: Tensor, weight_TK: Tensor | None, assignment: Assignment) -> Tensor:
    """(Weighted) sum of each token's rows, in the dtype of the rows: ``[R, D], [T, K] -> [T, D]``."""
    return _Combine.apply(rows_RD, weight_TK, assignment.visit_R, assignment.row_TK)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, visit_R: Tensor, row_TK: Tensor) -> Tensor:
        ctx.save_for_backward(row_TK)
        return ops.permute(x_TD.contiguous(), visit_R, row_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (row_TK,) = ctx.saved_tensors
        return ops.combine(gradients[0].contiguous(), row_TK, None), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, weight_TK: Tensor | None, visit_R: Tensor, row_TK: Tensor) -> Tensor:
        rows_RD = rows_RD.contiguous()
        if weight_TK is None:
            ctx.save_for_backward(visit_R, row_TK)
        else:
            weight_TK = weight_TK.contiguous()
            ctx.save_for_backward(visit_R, row_TK, rows_RD, weight_TK)
        return ops.combine(rows_RD, row_TK, weight_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        grad_TD = gradients[0].contiguous()
        visit_R, row_TK, *weighted = ctx.saved_tensors
        if not weighted:
            return ops.permute(grad_TD, visit_R, row_TK), None, None, None
        rows_RD, weight_TK = weighted
        grad_rows_RD, grad_weight_TK = ops.combine_backward(grad_TD, rows_RD, visit_R, weight_TK)
        return grad_rows_RD, grad_weight_TK, None, None
