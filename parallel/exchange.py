"""Token exchange between the ranks that share a layer's experts, and the reductions that go with it.

An `Exchange` moves rows of tokens to the ranks of an expert-parallel group and back. Its `size` says over how many
ranks the experts are spread; on one rank nothing moves.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


class Exchange(Protocol):
    """Ragged all-to-all over an expert-parallel group, differentiable in the rows."""

    @property
    def size(self) -> int:
        """Ranks in the group."""

    @property
    def rank(self) -> int:
        """This rank's place in the group."""

    def counts(self, sent_PE: Tensor) -> Tensor:
        """Tell every rank how many rows come: ``[P, El]`` rows for each peer's experts -> rows from each peer."""

    def rows(self, rows_RD: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """Send ``sent[p]`` consecutive rows to peer p; returns the rows received, by peer."""


class LocalExchange:
    """All experts on this rank."""

    size = 1
    rank = 0

    def counts(self, sent_PE: Tensor) -> Tensor:
        return sent_PE

    def rows(self, rows_RD: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        return rows_RD


class TorchExchange:
    """`torch.distributed.all_to_all_single` over ``group`` (gloo or NCCL)."""

    def __init__(self, group: ProcessGroup):
        self.group = group
        self.size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)

    def counts(self, sent_PE: Tensor) -> Tensor:
        received_PE = torch.empty_like(sent_PE)
        dist.all_to_all_single(received_PE, sent_PE.contiguous(), group=self.group)
        return received_PE

    def rows(self, rows_RD: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        return _AllToAll.apply(rows_RD, list(sent), list(received), self.group)


class _AllToAll(torch.autograd.Function):
    """The gradient of an exchange is the exchange back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: ProcessGroup) -> Tensor:
        ctx.route = (sent, received, group)
        arrived = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(arrived, rows.contiguous(), received, sent, group=group)
        return arrived

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = gradients
        sent, received, group = ctx.route
        returned = gradient.new_empty(sum(sent), *gradient.shape[1:])
        dist.all_to_all_single(returned, gradient.contiguous(), sent, received, group=group)
        return returned, None, None, None


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
