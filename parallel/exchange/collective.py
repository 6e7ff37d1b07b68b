"""The token exchange through torch.distributed: gloo on CPU, NCCL on CUDA."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from .gradient import differentiable
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
        return differentiable(self._send, rows_RD, sent, received)

    def _send(self, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        arrived = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(arrived, rows.contiguous(), list(received), list(sent), group=self.group)
        return arrived

    def plan(self, moves: Moves) -> Plan:
        return CollectivePlan(self.group, moves)

    def plans(
        self, sent_CP: Sequence[Sequence[int]], received_CP: Sequence[Sequence[int]], device: torch.device
    ) -> list[Plan]:
        return [self.plan(Moves.flat(*counts)) for counts in zip(sent_CP, received_CP, strict=True)]

    def close(self) -> None:
        pass
