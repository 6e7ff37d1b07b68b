"""Rows to the ranks of their experts, and back.

Two plans are involved: the sender's `Assignment` orders its tokens' visits by expert, and so by rank; the receiver's
orders the rows that came (by rank) by its own experts, each row being a token with one visit. Where an exchange can
take rows from where they are (`GatheringExchange`), they are never laid out by rank on this side.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..parallel.exchange import Exchange, GatheringExchange
from . import ops
from .dispatch import Assignment, combine, permute


def deliver(
    x_TD: Tensor,
    assignment: Assignment,
    arrival: Assignment,
    exchange: Exchange,
    sent: Sequence[int],
    received: Sequence[int],
) -> Tensor:
    """Tokens, as rows ordered by expert, where their experts are: ``[T, D] -> [R, D]``.

    Args:
        assignment: orders this rank's tokens by expert.
        arrival: orders the rows that come by expert, each with one visit.
        sent: rows for each rank of the exchange.
        received: rows from each rank.
    """
    if isinstance(exchange, GatheringExchange):
        return _Deliver.apply(x_TD, assignment, arrival, exchange, list(sent), list(received))
    return permute(exchange.rows(permute(x_TD, assignment), sent, received), arrival)


def give_back(
    rows_RD: Tensor, arrival: Assignment, exchange: Exchange, sent: Sequence[int], received: Sequence[int]
) -> Tensor:
    """The experts' results where their tokens are, in the order that ``assignment`` gave them; see `deliver`."""
    if isinstance(exchange, GatheringExchange):
        return _GiveBack.apply(rows_RD, arrival, exchange, list(sent), list(received))
    return exchange.rows(combine(rows_RD, None, arrival), received, sent)


class _Deliver(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        assignment: Assignment,
        arrival: Assignment,
        exchange: GatheringExchange,
        sent: list[int],
        received: list[int],
    ) -> Tensor:
        ctx.route = (exchange, sent, received)
        ctx.save_for_backward(assignment.row_TK, arrival.row_TK)
        arrived = exchange.gathered(x_TD, assignment.visit_R, assignment.row_TK.shape[1], sent, received)
        return ops.permute(arrived, arrival.visit_R, arrival.row_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        exchange, sent, received = ctx.route
        row_TK, row_R1 = ctx.saved_tensors
        returned = exchange.gathered(gradients[0], row_R1.flatten(), 1, received, sent)
        return ops.combine(returned, row_TK, None), None, None, None, None, None


class _GiveBack(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows_RD: Tensor,
        arrival: Assignment,
        exchange: GatheringExchange,
        sent: list[int],
        received: list[int],
    ) -> Tensor:
        ctx.route = (exchange, sent, received)
        ctx.save_for_backward(arrival.visit_R, arrival.row_TK)
        return exchange.gathered(rows_RD, arrival.row_TK.flatten(), 1, received, sent)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        exchange, sent, received = ctx.route
        visit_R, row_R1 = ctx.saved_tensors
        return ops.permute(exchange.rows(gradients[0], sent, received), visit_R, row_R1), None, None, None, None
