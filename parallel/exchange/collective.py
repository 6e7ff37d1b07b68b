"""The token exchange through torch.distributed: gloo on CPU, NCCL on CUDA."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from .plan import Moves, Plan
from .planned import CollectivePlan


class TorchExchange:
    """`torch.distributed.all_to_all_single` over ``group`` (gloo or NCCL)."""

    def __init__(self, group: ProcessGroup):
        self.group = group
        self.size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)

    def counts(self, sent_PE: Tensor) -> Tensor:
        received_PE = torch.empty_like(sent_PE, memory_format=torch.contiguous_format)
        dist.all_to_all_single(received_PE, sent_PE.contiguous(), group=self.group)
        return received_PE

    def rows(self, rows_RD: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        return _AllToAll.apply(rows_RD, list(sent), list(received), self.group)

    def plan(self, moves: Moves) -> Plan:
        return CollectivePlan(self.group, moves)

    def plans(
        self, sent_CP: Sequence[Sequence[int]], received_CP: Sequence[Sequence[int]], device: torch.device
    ) -> list[Plan]:
        return [self.plan(Moves.flat(*counts)) for counts in zip(sent_CP, received_CP, strict=True)]

    def close(self) -> None:
        pass


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
