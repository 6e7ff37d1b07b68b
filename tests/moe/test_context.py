"""Contexts reach both passes of a recomputation, in every order that a pipeline runs them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moescale.moe.context import ContextQueue, RoutingContext


def forward(queue: ContextQueue, number: int) -> None:
    queue.begin(RoutingContext(step=number))
    with torch.no_grad():
        assert step_of(queue, recomputed=True) == number


def step_of(queue: ContextQueue, recomputed: bool) -> int:
    context = queue.take(recomputed)
    assert context is not None
    return context.step


@settings(deadline=None)
@given(st.lists(st.booleans(), max_size=30))
def test_micro_batches_in_flight(moves: list[bool]) -> None:
    """Forward (True) and backward passes in any order that has something to take back."""
    queue = ContextQueue()
    forwards = backwards = 0
    for ahead in moves:
        if ahead:
            forward(queue, forwards)
            forwards += 1
        elif backwards < forwards:
            assert step_of(queue, recomputed=True) == backwards
            backwards += 1
    while backwards < forwards:
        assert step_of(queue, recomputed=True) == backwards
        backwards += 1
    queue.end()
    assert queue.take(recomputed=False) is None


@pytest.mark.parametrize("gradients", [True, False])
def test_passes_without_recomputation_leave_nothing_behind(gradients: bool) -> None:
    queue = ContextQueue()
    forward(queue, 0)
    queue.begin(RoutingContext(step=5))
    with torch.set_grad_enabled(gradients):
        assert step_of(queue, recomputed=False) == 5
    assert step_of(queue, recomputed=True) == 0
    queue.end()


def test_a_pass_that_was_never_recomputed_is_an_error() -> None:
    queue = ContextQueue()
    forward(queue, 0)
    with pytest.raises(RuntimeError, match="1 forward passes were announced as recomputed"):
        queue.end()
