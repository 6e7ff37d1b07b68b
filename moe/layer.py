"""The MoE layer: route, permute, exchange, experts, exchange back, combine. A plain module; no engine in sight."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ..parallel.exchange import Exchange, LocalExchange
from .balance import Balance
from .capacity import rows_limit, within_capacity
from .config import MoEConfig
from .context import RoutingContext
from .delivery import deliver, give_back
from .dispatch import Assignment, combine, permute
from .experts import GroupedExperts, SharedExperts, row_multiple
from .overlap import check_chunks, mix_in_chunks
from .routers import build_router
from .routing import Routing, TokenGrid
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
        exchange_chunks: in how many parts a rank's experts take and give their rows, so that one part's travel
            while another's are computed (moe/overlap.py); must divide E / P.
        sequence_group: ranks among which each sequence's tokens are spread, or None.
        batch_first: input is ``[B, S, D]`` instead of Megatron's ``[S, B, D]``.
        layer: number of this layer in the model: random and hashed routing differ by layer.

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
        exchange_chunks: int = 1,
        sequence_group: ProcessGroup | None = None,
        batch_first: bool = False,
        layer: int = 0,
    ):
        super().__init__()
        self.config = config
        self.exchange: Exchange = exchange or LocalExchange()
        self.exchange_chunks = exchange_chunks
        if config.experts % self.exchange.size:
            raise ValueError(f"the exchange's ranks ({self.exchange.size}) must divide moe.experts ({config.experts})")
        check_chunks(self.exchange, exchange_chunks, config.experts // self.exchange.size)
        self.sequence_group = sequence_group
        self.batch_first = batch_first
        expert_width = config.width_of_expert(width)
        self.router = build_router(width, config, layer)
        self.balance = Balance(config)
        self.experts = GroupedExperts(config.experts // self.exchange.size, width, expert_width)
        self.shared = SharedExperts(width, config.shared * expert_width) if config.shared else None
        self.statistics: Tensor | None = None

    def forward(self, x: Tensor, mask: Tensor | None = None, context: RoutingContext | None = None) -> MoEOutput:
        """Apply the mixture.

        Args:
            x: ``[S, B, D]``, or ``[B, S, D]`` with ``batch_first``.
            mask: ``[S, B]`` or ``[B, S]`` bool, True for real tokens. Others get zeros and count nowhere.
            context: what hashed, jittered and forced routing depend on besides ``x``.
        """
        x_TD = x.reshape(-1, x.shape[-1])
        grid = TokenGrid(
            sequences=x.shape[0] if self.batch_first else x.shape[1],
            batch_first=self.batch_first,
            mask_T=None if mask is None else mask.reshape(-1),
            group=self.sequence_group,
        )
        routing = self.router(x_TD, grid, context, bias_E=self.balance.bias_E)
        losses = self.balance.loss(routing, grid)
        served = within_capacity(routing, grid, self.config)
        y_TD = self._mix(x_TD, served, rows_limit(self.config, grid, len(x_TD)))
        if self.shared is not None:
            shared_TD = self.shared(x_TD)
            y_TD = y_TD + (shared_TD if grid.mask_T is None else shared_TD * grid.mask_T.unsqueeze(-1))
        if torch.is_grad_enabled():
            vector = statistics_vector(routing, served, losses, grid)
            self.statistics = vector if self.statistics is None else self.statistics + vector
        return MoEOutput(y_TD.view_as(x), losses.total)

    def _mix(self, x_TD: Tensor, routing: Routing, limit: int | None) -> Tensor:
        """The weighted sum of each token's experts; ``limit``: rows that each expert gets, None for as many as come."""
        multiple = row_multiple(x_TD)
        if limit is not None:
            limit = -(-limit // multiple) * multiple
        if self.exchange.size > 1 and self.exchange_chunks > 1:
            return mix_in_chunks(x_TD, routing, self.experts, self.exchange, self.exchange_chunks, limit)
        if self.exchange.size > 1:
            apply = self._ragged_elsewhere if limit is None else self._padded_elsewhere
            assignment = Assignment.build(routing.index_TK, self.config.experts, limit=limit)
            return apply(x_TD, assignment, routing.weight_TK)
        assignment = Assignment.build(routing.index_TK, self.config.experts, multiple=multiple, limit=limit)
        rows_RD = self.experts(permute(x_TD, assignment), assignment, routing.weight_TK)
        return combine(rows_RD, None, assignment)

    def _ragged_elsewhere(self, x_TD: Tensor, assignment: Assignment, weight_TK: Tensor) -> Tensor:
        """Rows to the ranks of their experts and back in the same order; weights stay here."""
        sent_PE = assignment.counts_E.view(self.exchange.size, -1)
        received_PE = self.exchange.counts(sent_PE)
        sent, received = sent_PE.sum(dim=1).tolist(), received_PE.sum(dim=1).tolist()
        # Rows arrive ordered by (peer, expert) and are needed by (expert, peer): an assignment with K = 1.
        local = self.experts.w_in.shape[0]
        expert_of_row = torch.arange(local, device=x_TD.device).repeat(self.exchange.size)
        index_R1 = expert_of_row.repeat_interleave(received_PE.flatten()).unsqueeze(-1)
        arrival = Assignment.build(index_R1, local, multiple=row_multiple(x_TD))
        return self._elsewhere(x_TD, assignment.cut(sum(sent)), arrival, sent, received, weight_TK)

    def _padded_elsewhere(self, x_TD: Tensor, assignment: Assignment, weight_TK: Tensor) -> Tensor:
        """The same with as many rows for each expert on each rank, so that no size has to be asked or read."""
        peers, local = self.exchange.size, self.experts.w_in.shape[0]
        rows = len(assignment.visit_R)
        place_R = torch.arange(rows, device=x_TD.device)
        arrival = replace(
            Assignment.even(local, rows // local, x_TD.device),
            visit_R=place_R.view(peers, local, -1).transpose(0, 1).flatten(),
            row_TK=place_R.view(local, peers, -1).transpose(0, 1).reshape(-1, 1),
        )
        even = [rows // peers] * peers
        return self._elsewhere(x_TD, assignment, arrival, even, even, weight_TK)

    def _elsewhere(
        self,
        x_TD: Tensor,
        assignment: Assignment,
        arrival: Assignment,
        sent: list[int],
        received: list[int],
        weight_TK: Tensor,
    ) -> Tensor:
        rows_RD = self.experts(deliver(x_TD, assignment, arrival, self.exchange, sent, received), arrival)
        return combine(give_back(rows_RD, arrival, self.exchange, sent, received), weight_TK, assignment)

    def take_statistics(self) -> Tensor:
        """The statistics vector summed since the last call; forgets it."""
        if self.statistics is None:
            raise RuntimeError("no forward pass with gradients since the statistics were last taken")
        vector, self.statistics = self.statistics, None
        return vector
