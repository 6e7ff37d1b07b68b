"""Small-batch gradient norms beside the step's own gradient."""

import math
from collections.abc import Callable
from typing import Any

import torch


def test_small_batches_on_one_rank(train: Callable[..., Any]) -> None:
    """Mean squared norm of each small batch alone, and their mean as the step's gradient."""
    from moescale.parallel.noise import SmallBatchGradients

    made = train()
    small = SmallBatchGradients(made.engine, parts=3)
    alone = []
    for part in range(3):
        made.backward(first=2 * part)
        alone.append({p: p.grad.double().clone() for p in made.engine.parameters})
        small.take()
        assert all(p.grad is None for p in made.engine.parameters)
    squares = small.give_back()
    for expert, found in ((False, squares.dense), (True, squares.expert)):
        each = [sum(g.square().sum().item() for p, g in one.items() if made.roles[p].expert == expert) for one in alone]
        assert math.isclose(found, sum(each) / 3, rel_tol=1e-5)
    for parameter in made.engine.parameters:
        mean = sum(one[parameter] for one in alone) / 3
        torch.testing.assert_close(parameter.grad.double(), mean, rtol=1e-4, atol=1e-8)
    made.engine.reduce()
    assert 0 < made.engine.squares().total < squares.total
    made.engine.step(0.01)
