"""Differentiable sums over the ranks that share out a sequence's tokens or a layer's heads."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


class _SumForShares(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, share: Tensor, group: ProcessGroup) -> Tensor:
        total = share.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _SumOfSplits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        total = part.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _SplitUse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, same: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return same.view_as(same)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


def sum_then_same_everywhere(share: Tensor, group: ProcessGroup | None) -> Tensor:
    """Sum over ranks, when everything computed from the sum is computed alike on every rank.

    Each rank then already holds the whole gradient of the sum, so the backward pass passes it on unchanged.
    """
    return share if group is None else _SumForShares.apply(share, group)


def sum_then_split_use(part: Tensor, group: ProcessGroup | None) -> Tensor:
    """Sum over ranks, when each rank uses the sum for its own part of what follows.

    Each rank then holds only its part of the gradient, so the backward pass sums the parts.
    """
    return part if group is None else _SumOfSplits.apply(part, group)


def same_then_split_use(same: Tensor, group: ProcessGroup | None) -> Tensor:
    """What every rank has alike, when each uses it for its own part of what follows: unchanged.

    The backward pass sums the ranks' parts of the gradient. (Megatron's function of the kind loses the sum where the
    gradient is not contiguous.)
    """
    return same if group is None else _SplitUse.apply(same, group)
