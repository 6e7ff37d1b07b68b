"""Differentiable sums in a world of one; tests/training proves them over ranks."""

from typing import Any

import torch

from moescale.parallel.sums import same_then_split_use, sum_then_same_everywhere, sum_then_split_use


def test_sums_over_nobody_change_nothing() -> None:
    x = torch.randn(3)
    assert sum_then_same_everywhere(x, None) is x
    assert sum_then_split_use(x, None) is x
    assert same_then_split_use(x, None) is x


def test_sums_over_one_rank(one_rank: Any) -> None:
    x = torch.randn(3, requires_grad=True)
    for total in (sum_then_same_everywhere, sum_then_split_use, same_then_split_use):
        y = total(x, one_rank.tensor)
        assert torch.equal(y, x)
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.ones(3))
