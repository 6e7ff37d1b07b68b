"""The MoE layer: route, permute, exchange, experts, exchange back, combine. A plain module; no engine in sight."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ..parallel.exchange import Exchange, LocalExchange
from .balance import TokenGrid, load_balance_loss, visits_by_sequence, z_loss_sum
from .config import MoEConfig
from .dispatch import Assignment, combine, permute
from .experts import GroupedExperts, SharedExperts, row_multiple
from .router import Routing, TopKRouter
from .statistics import statistics_vector


@dataclass(frozen=True)
class MoEOutput:
    """``hidden`` has the input's shape; ``loss`` is what to add to this micro-batch's mean loss on this rank."""

    hidden: Tensor
    loss: Tensor


class MoELayer(nn.Module):
    """A mixture of SwiGLU experts in place of a feed-forward layer.

    Args:
        width: model width D.
        config: experts, routing and losses.
        exchange: where the other experts are; default: all here. Expert parallelism over P ranks gives each rank
            the experts ``[rank * E / P, (rank + 1) * E / P)``.
        sequence_group: ranks among which each sequence's tokens are spread, or None.
        batch_first: input is ``[B, S, D]`` instead of Megatron's ``[S, B, D]``.

    After each forward pass with gradients ``statistics`` holds the sums of moe/statistics.py since `take_statistics`.
    Passes without gradients leave it alone: evaluation, and the first pass of Megatron's recomputation (or of torch's
    with ``use_reentrant=True``; without reentry both passes have gradients and both count).
    """

    def __init__(
        self,
        width: int,
        config: MoEConfig,
        *,
        exchange: Exchange | None = None,
        sequence_group: ProcessGroup | None = None,
        batch_first: bool = False,
    ):
        super().__init__()
        self.config = config
        self.exchange: Exchange = exchange or LocalExchange()
        if config.experts % self.exchange.size:
            raise ValueError(f"the exchange's ranks ({self.exchange.size}) must divide moe.experts ({config.experts})")
        self.sequence_group = sequence_group
        self.batch_first = batch_first
        expert_width = config.width_of_expert(width)
        self.router = TopKRouter(width, config.experts, config.active, config.score)
        self.experts = GroupedExperts(config.experts // self.exchange.size, width, expert_width)
        self.shared = SharedExperts(width, config.shared * expert_width) if config.shared else None
        self.statistics: Tensor | None = None

    def forward(self, x: Tensor, mask: Tensor | None = None) -> MoEOutput:
        """Apply the mixture.

        Args:
            x: ``[S, B, D]``, or ``[B, S, D]`` with ``batch_first``.
            mask: ``[S, B]`` or ``[B, S]`` bool, True for real tokens. Others get zeros and count nowhere.
        """
        x_TD = x.reshape(-1, x.shape[-1])
        grid = TokenGrid(
            sequences=x.shape[0] if self.batch_first else x.shape[1],
            batch_first=self.batch_first,
            mask_T=None if mask is None else mask.reshape(-1),
            group=self.sequence_group,
        )
        routing = self.router(x_TD)
        weight_TK = routing.weight_TK if grid.mask_T is None else routing.weight_TK * grid.mask_T.unsqueeze(-1)
        y_TD = self._mix(x_TD, routing.index_TK, weight_TK)
        if self.shared is not None:
            shared_TD = self.shared(x_TD)
            y_TD = y_TD + (shared_TD if grid.mask_T is None else shared_TD * grid.mask_T.unsqueeze(-1))
        return MoEOutput(y_TD.view_as(x), self._losses(routing, grid))

    def _mix(self, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        here = self.exchange.size == 1
        assignment = Assignment.build(index_TK, self.config.experts, row_multiple(x_TD) if here else 1)
        rows_RD = permute(x_TD, assignment)
        apply = self.experts if here else self._experts_elsewhere
        return combine(apply(rows_RD, assignment.counts_E), weight_TK, assignment)

    def _experts_elsewhere(self, rows_RD: Tensor, counts_E: Tensor) -> Tensor:
        """Rows to the ranks of their experts, through the experts, and back in the same order."""
        sent_PE = counts_E.view(self.exchange.size, -1)
        received_PE = self.exchange.counts(sent_PE)
        sent, received = sent_PE.sum(dim=1).tolist(), received_PE.sum(dim=1).tolist()
        arrived = self.exchange.rows(rows_RD, sent, received)
        # Rows arrive ordered by (peer, expert) and are needed by (expert, peer): an assignment with K = 1.
        local = self.experts.w_in.shape[0]
        expert_of_row = torch.arange(local, device=counts_E.device).repeat(self.exchange.size)
        index_R1 = expert_of_row.repeat_interleave(received_PE.flatten()).unsqueeze(-1)
        regroup = Assignment.build(index_R1, local, row_multiple(arrived))
        done = self.experts(permute(arrived, regroup), regroup.counts_E)
        back = combine(done, torch.ones(index_R1.shape, device=done.device), regroup)
        return self.exchange.rows(back, received, sent)

    def _losses(self, routing: Routing, grid: TokenGrid) -> Tensor:
        visits_BE = visits_by_sequence(routing, grid)
        aux = load_balance_loss(routing, visits_BE, grid)
        z_sum = z_loss_sum(routing, grid)
        if torch.is_grad_enabled():
            vector = statistics_vector(routing, visits_BE, aux, z_sum, grid)
            self.statistics = vector if self.statistics is None else self.statistics + vector
        loss = self.config.z_loss * z_sum / _tokens_in_all(routing, grid)
        if self.config.balance == "sequence":
            loss = loss + self.config.aux_loss * aux
        return loss

    def take_statistics(self) -> Tensor:
        """The statistics vector summed since the last call; forgets it."""
        if self.statistics is None:
            raise RuntimeError("no forward pass with gradients since the statistics were last taken")
        vector, self.statistics = self.statistics, None
        return vector


def _tokens_in_all(routing: Routing, grid: TokenGrid) -> Tensor | int:
    """Real tokens of this micro-batch over all ranks that share its sequences."""
    tokens: Tensor | int = routing.index_TK.shape[0] if grid.mask_T is None else grid.mask_T.sum()
    if grid.group is None:
        return max(tokens, 1) if isinstance(tokens, int) else tokens.clamp(min=1)
    if isinstance(tokens, int):
        return tokens * torch.distributed.get_world_size(grid.group)
    torch.distributed.all_reduce(tokens, group=grid.group)
    return tokens.clamp(min=1)
