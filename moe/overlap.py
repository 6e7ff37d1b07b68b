"""Expert parallelism in chunks: one chunk's rows travel while another's expert products run.

A chunk is a share of every rank's experts. So each expert still sees all its rows in one product, in the same order
as without chunks, and no weight is used or differentiated twice.

Forward, with two chunks on the way (``>`` out, ``<`` back, ``*`` products)::

    network   >0 >1    <0 <1
    compute      *0 *1

All chunks leave at once, since the network takes one after the other anyway. The backward pass is the same picture
read from the right. Automatic differentiation runs it in that order by itself: of the steps that are ready it takes
the one that the forward pass came to last.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..parallel.exchange import Exchange
from ..parallel.exchange.plan import Plan, PlannedExchange, Transfer, start
from .dispatch import Assignment, combine, permute
from .experts import GroupedExperts, apply_experts, row_multiple
from .routing import Routing


def check_chunks(exchange: Exchange, chunks: int, local_experts: int) -> None:
    """
    Raises:
        ValueError: the experts of a rank cannot be cut into so many chunks, or the exchange cannot work on its own.
    """
    if chunks == 1 or exchange.size == 1:
        return
    if local_experts % chunks:
        raise ValueError(f"the chunks of an exchange ({chunks}) must divide the experts of a rank ({local_experts})")
    if not isinstance(exchange, PlannedExchange):
        raise ValueError(f"{type(exchange).__name__} cannot exchange while a rank computes: use one chunk")


def mix_in_chunks(
    x_TD: Tensor, routing: Routing, experts: GroupedExperts, exchange: Exchange, chunks: int, limit: int | None
) -> Tensor:
    """The weighted sum of each token's experts, ``[T, D]``.

    Args:
        experts: this rank's.
        chunks: more than 1, and as `check_chunks` allows.
        limit: rows that each expert gets from each rank, None for as many as come.
    """
    assert isinstance(exchange, PlannedExchange)
    peers, local = exchange.size, len(experts.w_in)
    each = local // chunks
    index_TK = chunk_order(routing.index_TK, peers, chunks, each)
    assignment = Assignment.build(index_TK, peers * local, limit=limit)
    sent_CPJ = assignment.counts_E.view(chunks, peers, each)
    if limit is None:
        received_PE = exchange.counts(sent_CPJ.transpose(0, 1).reshape(peers, local))
        received_CPJ = received_PE.view(peers, chunks, each).transpose(0, 1)
        sent_CP, received_CP = torch.stack([sent_CPJ, received_CPJ]).sum(dim=-1).tolist()
    else:
        received_CPJ = sent_CPJ
        sent_CP = received_CP = [[each * limit] * peers] * chunks
    plans = exchange.plans(sent_CP, received_CP, x_TD.device)
    assignment = assignment.cut(sum(plan.leaving for plan in plans))

    out, back = _Chunks(plans), _Chunks(plans)
    leaving = _Depart.apply(permute(x_TD, assignment), out)
    weights = zip(experts.w_in.split(each), experts.w_out.split(each), strict=True)
    returning = []
    for chunk, (token, (w_in, w_out)) in enumerate(zip(leaving, weights, strict=True)):
        arrived = _Arrive.apply(token, out, chunk)
        done = _products(arrived, received_CPJ[chunk], w_in, w_out)
        returning.append(_Return.apply(done, back, chunk))
    return combine(_Join.apply(back, *returning), routing.weight_TK, assignment)


def chunk_order(index_TK: Tensor, peers: int, chunks: int, each: int) -> Tensor:
    """Experts renumbered so that those of a chunk are neighbours: by (chunk, peer, expert) instead of (peer, chunk,
    expert). Numbers that are no expert's become -1."""
    rank_chunk = index_TK.div(each, rounding_mode="floor")
    peer, chunk = rank_chunk.div(chunks, rounding_mode="floor"), rank_chunk % chunks
    renumbered = (chunk * peers + peer) * each + index_TK % each
    legal = (index_TK >= 0) & (index_TK < peers * chunks * each)
    return renumbered.where(legal, -1)


def _products(arrived_RD: Tensor, received_PJ: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    """Each row through its expert. Rows arrive by (peer, expert) and are needed by (expert, peer)."""
    peers, local = received_PJ.shape
    expert_of_row = torch.arange(local, device=arrived_RD.device).repeat(peers)
    index_R1 = expert_of_row.repeat_interleave(received_PJ.flatten(), output_size=len(arrived_RD)).unsqueeze(-1)
    regroup = Assignment.build(index_R1, local, multiple=row_multiple(arrived_RD))
    return combine(apply_experts(permute(arrived_RD, regroup), None, w_in, w_out, regroup), None, regroup)


class _Chunks:
    """Transfers between whole rows and their chunks, in one direction of one layer."""

    def __init__(self, plans: Sequence[Plan]):
        self.plans = plans
        self.transfers: list[Transfer | None] = [None] * len(plans)
        self.whole: Tensor | None = None

    def depart(self, rows_RD: Tensor, order: Sequence[int]) -> None:
        """Start all chunks of ``rows_RD``, in this order."""
        parts = rows_RD.split([plan.leaving for plan in self.plans])
        for chunk in order:
            self.transfers[chunk] = start(parts[chunk], self.plans[chunk])

    def arrived(self, chunk: int) -> Tensor:
        """Wait for a chunk."""
        transfer, self.transfers[chunk] = self.transfers[chunk], None
        assert transfer is not None
        return transfer.wait()

    def send_back(self, rows_RD: Tensor, chunk: int) -> None:
        """Start a chunk's way back to its place among the whole rows."""
        if self.whole is None:
            self.whole = rows_RD.new_empty(sum(plan.leaving for plan in self.plans), *rows_RD.shape[1:])
        part = self.whole.split([plan.leaving for plan in self.plans])[chunk]
        self.transfers[chunk] = self.plans[chunk].reversed().start(rows_RD, part)

    def joined(self) -> Tensor:
        """Wait for all chunks; the whole rows."""
        for chunk in range(len(self.plans)):
            self.arrived(chunk)
        whole, self.whole = self.whole, None
        assert whole is not None
        return whole


# Between the steps below go tokens without elements: what is still under way cannot be read by mistake.


class _Depart(torch.autograd.Function):
    """All chunks leave; their gradients come back."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, chunks: _Chunks) -> tuple[Tensor, ...]:
        ctx.chunks = chunks
        chunks.depart(rows_RD.contiguous(), range(len(chunks.plans)))
        return tuple(rows_RD.new_empty(0) for _ in chunks.plans)

    @staticmethod
    def backward(ctx: Any, *tokens: Tensor) -> tuple[Tensor, None]:
        return ctx.chunks.joined(), None


class _Arrive(torch.autograd.Function):
    """Wait for a chunk; its gradient leaves."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, chunks: _Chunks, chunk: int) -> Tensor:
        ctx.chunks, ctx.chunk = chunks, chunk
        return chunks.arrived(chunk)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        ctx.chunks.send_back(gradients[0].contiguous(), ctx.chunk)
        return gradients[0].new_empty(0), None, None


class _Return(torch.autograd.Function):
    """A chunk's results leave; wait for their gradient."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, chunks: _Chunks, chunk: int) -> Tensor:
        ctx.chunks, ctx.chunk = chunks, chunk
        chunks.send_back(rows_RD.contiguous(), chunk)
        return rows_RD.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *tokens: Tensor) -> tuple[Tensor, None, None]:
        return ctx.chunks.arrived(ctx.chunk), None, None


class _Join(torch.autograd.Function):
    """Wait for the results of all chunks; their gradients leave, those needed first at first."""

    @staticmethod
    def forward(ctx: Any, chunks: _Chunks, *tokens: Tensor) -> Tensor:
        ctx.chunks = chunks
        return chunks.joined()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ctx.chunks.depart(gradients[0].contiguous(), range(len(ctx.chunks.plans))[::-1])
        return None, *(gradients[0].new_empty(0) for _ in ctx.chunks.plans)
