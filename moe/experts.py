"""Experts: feed-forward networks over rows ordered by expert."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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

    def forward(self, rows_RD: Tensor, counts_E: Tensor) -> Tensor:
        """Apply expert j to its ``counts_E[j]`` consecutive rows; any count may be zero, all may be."""
        ends_E = counts_E.cumsum(0).to(torch.int32)
        gate_up = F.grouped_mm(rows_RD, self.w_in.transpose(1, 2), offs=ends_E)
        gate_RF, up_RF = gate_up.chunk(2, dim=-1)
        return F.grouped_mm(F.silu(gate_RF) * up_RF, self.w_out.transpose(1, 2), offs=ends_E)


class SharedExperts(nn.Module):
    """Experts that every token visits (DeepSeekMoE, 2401.06066, eq. 9): one SwiGLU as wide as all of them."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.w_in = nn.Parameter(torch.empty(2 * hidden, width))
        self.w_out = nn.Parameter(torch.empty(width, hidden))

    def forward(self, x_TD: Tensor) -> Tensor:
        gate_TF, up_TF = F.linear(x_TD, self.w_in).chunk(2, dim=-1)
        return F.linear(F.silu(gate_TF) * up_TF, self.w_out)
