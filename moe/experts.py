"""Experts: feed-forward networks over rows ordered by expert."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from . import ops
from .dispatch import Assignment


def row_multiple(x: Tensor) -> int:
    """What to round each expert's rows up to, so that grouped products of ``x``'s kind are fast.

    torch's bf16 products on CPU build a kernel for every new number of rows, which takes longer than the product:
    rounding up leaves few numbers to meet (docs/findings.md).
    """
    return 32 if x.device.type == "cpu" and x.dtype == torch.bfloat16 else 1


class GroupedExperts(nn.Module):
    """El SwiGLU experts (Shazeer 2020, 2002.05202, eq. 6) as two grouped matrix products.

    ``w_in`` holds each expert's gate over its up projection, ``[El, 2F, D]``; ``w_out`` is ``[El, D, F]``. Both are
    stored like `nn.Linear` weights, outputs first.
    """

    def __init__(self, local_experts: int, width: int, expert_width: int):
        super().__init__()
        self.w_in = nn.Parameter(torch.empty(local_experts, 2 * expert_width, width))
        self.w_out = nn.Parameter(torch.empty(local_experts, width, expert_width))

    def forward(self, rows_RD: Tensor, assignment: Assignment, weight_TK: Tensor | None = None) -> Tensor:
        """Apply expert j to its ``counts_E[j]`` consecutive rows; any count may be zero, all may be.

        Args:
            weight_TK: multiplies the result of each visit. It is applied to the activations, which are narrower
                than the result where experts are fine, and need not be kept for its gradient.
        """
        return apply_experts(rows_RD, weight_TK, self.w_in, self.w_out, assignment)


def apply_experts(
    rows_RD: Tensor, weight_TK: Tensor | None, w_in: Tensor, w_out: Tensor, assignment: Assignment
) -> Tensor:
    """`GroupedExperts` with weights that are given."""
    return _Experts.apply(rows_RD, weight_TK, w_in, w_out, assignment)


class _Experts(torch.autograd.Function):
    """Both products and the SwiGLU between them. Keeps the rows and ``gate_up``; recomputes the activations, which
    take the place of their gradient."""

    @staticmethod
    def forward(
        ctx: Any, rows_RD: Tensor, weight_TK: Tensor | None, w_in: Tensor, w_out: Tensor, assignment: Assignment
    ) -> Tensor:
        weight_TK = None if weight_TK is None else weight_TK.contiguous()
        visit_R = None if weight_TK is None else assignment.visit_R
        gate_up = F.grouped_mm(rows_RD, w_in.transpose(1, 2), offs=assignment.ends_E)
        act_RF = ops.swiglu(gate_up, weight_TK, visit_R)
        ctx.save_for_backward(rows_RD, gate_up, weight_TK, visit_R, w_in, w_out, assignment.ends_E)
        return F.grouped_mm(act_RF, w_out.transpose(1, 2), offs=assignment.ends_E)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows_RD, gate_up, weight_TK, visit_R, w_in, w_out, ends_E = _take_saved(ctx)
        grad_out_RD = gradients[0].contiguous()
        act_RF = F.grouped_mm(grad_out_RD, w_out, offs=ends_E)  # the gradient of the activations, until overwritten
        grad_gate_up, grad_weight_TK = ops.swiglu_backward(act_RF, gate_up, weight_TK, visit_R)
        del gate_up
        grad_w_out = F.grouped_mm(grad_out_RD.t(), act_RF, offs=ends_E)
        del act_RF  # before the gradient of the larger weight is made
        grad_w_in = F.grouped_mm(grad_gate_up.t(), rows_RD, offs=ends_E)
        grad_rows_RD = F.grouped_mm(grad_gate_up, w_in, offs=ends_E)
        return grad_rows_RD, None if weight_TK is None else grad_weight_TK, grad_w_in, grad_w_out, None


def _take_saved(ctx: Any) -> tuple[Any, ...]:
    """What was saved; unless the graph is retained, only the caller holds it from here on, and can free it early."""
    saved: tuple[Any, ...] = ctx.saved_tensors
    ctx.maybe_clear_saved_tensors()
    return saved


class SharedExperts(nn.Module):
    """Experts that every token visits (DeepSeekMoE, 2401.06066, eq. 9): one SwiGLU as wide as all of them."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.w_in = nn.Parameter(torch.empty(2 * hidden, width))
        self.w_out = nn.Parameter(torch.empty(width, hidden))

    def forward(self, x_TD: Tensor) -> Tensor:
        """``[T, D] -> [T, D]``."""
        return feed_forward(x_TD, self.w_in, self.w_out)


def feed_forward(x_TD: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    """One SwiGLU feed-forward network, kept in memory as sparingly as the experts: ``[..., D] -> [..., D]``."""
    return _FeedForward.apply(x_TD, w_in, w_out)


class _FeedForward(torch.autograd.Function):
    """`_Experts` for a single expert that sees every token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
        x_TD = x.reshape(-1, x.shape[-1])
        gate_up = F.linear(x_TD, w_in)
        ctx.save_for_backward(x_TD, gate_up, w_in, w_out)
        ctx.shape = x.shape
        return F.linear(ops.swiglu(gate_up, None, None), w_out).view(*x.shape[:-1], w_out.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x_TD, gate_up, w_in, w_out = _take_saved(ctx)
        grad_out_TD = gradients[0].reshape(-1, w_out.shape[0])
        act_TF = grad_out_TD @ w_out  # the gradient of the activations, until overwritten
        grad_gate_up, _ = ops.swiglu_backward(act_TF, gate_up, None, None)
        del gate_up
        return (grad_gate_up @ w_in).view(ctx.shape), grad_gate_up.t() @ x_TD, grad_out_TD.t() @ act_TF
