"""Squared norms of small-batch gradients under any layout, for the gradient noise scale.

A small batch's gradient is summed over its own replicas (dense: data ranks, experts: expert-data ranks, tied
embeddings and sequence-parallel parameters as in a normal step), squared with weight 1 / replicas, and added to the
accumulator that is reduced at the end. Dense and expert parameters thus share one small batch, every distinct
parameter counts once, and the value depends on the layout no more than the loss does.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .engine import Engine, Squares, all_reduce_together


class SmallBatchGradients:
    """Takes the gradients of one small batch after another out of ``p.grad`` and gives back their mean.

    Args:
        parts: number of small batches in the step.
    """

    def __init__(self, engine: Engine, parts: int):
        self.engine = engine
        self.parts = parts
        self._mean: dict[nn.Parameter, Tensor] = {}
        self._squares: list[Squares] = []

    def take(self) -> None:
        """Account for the small batch whose gradients are in ``p.grad``, and clear them."""
        gradients = {p: p.grad for p in self.engine.parameters if p.grad is not None}
        own = {p: g.detach().float() / self.parts for p, g in gradients.items()}
        if self._mean:
            torch._foreach_add_([self._mean[p] for p in own], list(own.values()))
        else:
            self._mean = own
        whole = {p: g.detach().float() for p, g in gradients.items()}
        if self.engine.groups.topology.world > 1:
            whole = {p: g.clone() for p, g in whole.items()}
            self._sum_over_replicas(whole)
        self._squares.append(self.engine.total_squares(self._weighted(whole)))
        for parameter in self.engine.parameters:
            parameter.grad = None

    def give_back(self) -> Squares:
        """Put the mean of all small batches into ``p.grad``; returns the mean squared norm of a small batch."""
        for parameter, gradient in self._mean.items():
            parameter.grad = gradient
        count = len(self._squares)
        return Squares(sum(s.dense for s in self._squares) / count, sum(s.expert for s in self._squares) / count)

    def _sum_over_replicas(self, gradients: dict[nn.Parameter, Tensor]) -> None:
        engine, topology = self.engine, self.engine.groups.topology
        engine.sum_inside_replica(gradients)
        for expert, group in ((False, engine.groups.data), (True, engine.groups.expert_data)):
            members = [g for p, g in gradients.items() if engine.roles[p].expert == expert]
            if dist.get_world_size(group) > 1:
                all_reduce_together(members, group)
        torch._foreach_div_(list(gradients.values()), topology.data)

    def _weighted(self, gradients: dict[nn.Parameter, Tensor]) -> Iterator[tuple[nn.Parameter, Tensor, float]]:
        for parameter, gradient in gradients.items():
            # Every replica holds the whole sum here, as it does under ZeRO 0.
            yield parameter, gradient, self.engine.roles[parameter].norm_weight(self.engine.groups.topology, zero=0)
