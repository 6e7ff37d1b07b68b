"""Exchanges in a world of one; tests/training proves them over ranks."""

from typing import Any

import pytest
import torch

from moescale.parallel.exchange import LocalExchange, TorchExchange


def test_nothing_moves_on_one_rank() -> None:
    exchange, rows = LocalExchange(), torch.randn(5, 3)
    assert (exchange.size, exchange.rank) == (1, 0)
    assert exchange.rows(rows, [5], [5]) is rows
    counts = torch.tensor([[2, 3]])
    assert exchange.counts(counts) is counts


@pytest.mark.parametrize("rows", [0, 5])
def test_all_to_all_with_oneself(one_rank: Any, rows: int) -> None:
    exchange = TorchExchange(one_rank.expert)
    assert (exchange.size, exchange.rank) == (1, 0)
    assert exchange.counts(torch.tensor([[2, 3]])).tolist() == [[2, 3]]
    sent = torch.randn(rows, 3, requires_grad=True)
    arrived = exchange.rows(sent, [rows], [rows])
    assert torch.equal(arrived, sent)
    (gradient,) = torch.autograd.grad((2 * arrived).sum(), sent)
    assert torch.equal(gradient, torch.full_like(sent, 2.0))
