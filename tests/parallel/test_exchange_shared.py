"""Shared memory in one process that exchanges with itself: what it sends, and how it hands out memory."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moescale.parallel.exchange.shared import unavailable

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=f"no exchange through shared memory: {unavailable()}")
ops = torch.ops.moescale_exchange


@pytest.fixture(scope="module")
def alone() -> Iterator[int]:
    """An exchange of one rank."""
    handle = ops.open([0], 0, 5.0)
    yield handle
    ops.close(handle)


def send(rows: Tensor, handle: int) -> Tensor:
    arrived: Tensor = ops.send(rows, None, 1, [len(rows)], [len(rows)], handle)
    return arrived


@pytest.mark.parametrize("shape", [(0, 3), (5, 3), (4,), (2, 3, 4), (3, 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64], ids=str)
def test_rows_of_any_shape(shape: tuple[int, ...], dtype: torch.dtype, alone: int) -> None:
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul(9).to(dtype)
    arrived = send(rows, alone)
    assert arrived.dtype == dtype
    assert arrived.shape == rows.shape
    assert arrived.is_contiguous()
    assert torch.equal(arrived, rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_rows_are_gathered(dtype: torch.dtype, alone: int) -> None:
    rows = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    visit_R = torch.tensor([7, -1, 0, 3, 2])
    arrived = ops.send(rows, visit_R, 2, [5], [5], alone)
    assert torch.equal(arrived, rows[[3, 0, 0, 1, 1]] * torch.tensor([1, 0, 1, 1, 1], dtype=dtype).unsqueeze(-1))


def test_wrong_arguments_are_refused_before_anything_is_sent(alone: int) -> None:
    rows = torch.ones(4, 2)
    with pytest.raises(RuntimeError, match="do not add up to the rows"):
        ops.send(rows, None, 1, [3], [3], alone)
    with pytest.raises(ValueError, match="as many counts as there are ranks: 1"):
        ops.send(rows, None, 1, [2, 2], [2, 2], alone)
    with pytest.raises(RuntimeError, match="must be contiguous"):
        ops.send(rows.t(), None, 1, [2], [2], alone)
    with pytest.raises(RuntimeError, match="has another element type"):
        ops.send(rows, torch.zeros(4, dtype=torch.int32), 1, [4], [4], alone)
    assert torch.equal(send(rows, alone), rows)


def test_a_closed_exchange_sends_nothing() -> None:
    handle = ops.open([0], 0, 5.0)
    ops.close(handle)
    with pytest.raises(RuntimeError, match="the exchange is closed"):
        send(torch.ones(1, 1), handle)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.one_of(st.integers(0, 300), st.integers(-20, -1)), max_size=40))
def test_memory_is_never_handed_out_twice_and_always_given_back(steps: list[int]) -> None:
    """A number of elements asks for a block; a negative number frees one of those that live."""
    handle = ops.open([0], 0, 5.0)
    lowest = send(torch.zeros(1), handle).data_ptr()
    alive: list[tuple[int, Tensor]] = []
    for number, step in enumerate(steps):
        if step >= 0:
            alive.append((number, send(torch.full((step,), float(number)), handle)))
        elif alive:
            del alive[step % len(alive)]
        assert all(tensor.eq(number).all() for number, tensor in alive)
    alive.clear()
    whole = send(torch.zeros(10_000), handle)
    assert whole.data_ptr() == lowest, "freed neighbours were not joined"
    ops.close(handle)
