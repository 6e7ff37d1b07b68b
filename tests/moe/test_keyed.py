"""Random numbers by key: SplitMix64 as published, and alike however the tokens come."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moescale.moe import keyed
from moescale.moe.context import RoutingContext
from moescale.moe.routing import TokenGrid

BATCH, S, COUNT = 6, 5, 4
MASK = 2**64 - 1


def split_mix(state: int) -> int:
    """One output of SplitMix64 in unsigned whole numbers."""
    x = (state + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def test_the_first_outputs_are_the_published_ones() -> None:
    """The sequence from seed 0 that other implementations (Java, Rust, C) test themselves with."""
    found = keyed.extend(torch.zeros((), dtype=torch.int64), torch.arange(3))
    assert [n & MASK for n in found.tolist()] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


@settings(deadline=None)
@given(st.integers(0, MASK), st.integers(0, 2**40))
def test_wrapping_arithmetic_is_unsigned_arithmetic(key: int, number: int) -> None:
    signed = key - 2**64 if key >= 2**63 else key
    found = keyed.extend(torch.tensor(signed), torch.tensor(number))
    assert int(found) & MASK == split_mix((key + number * 0x9E3779B97F4A7C15) & MASK)


def test_numbers_lie_inside_the_unit_interval_and_fill_it() -> None:
    ends = torch.tensor([0, -1, 2**63 - 1, -(2**63)])
    assert keyed.uniform(ends).tolist() == [2**-24, 1 - 2**-24, 0.5 - 2**-24, 0.5 + 2**-24]
    many = keyed.uniform(keyed.numbers_of(keyed.key_of(1, 2, 3).view(1), 100_000))
    assert many.mean().item() == pytest.approx(0.5, abs=0.005)
    assert many.var().item() == pytest.approx(1 / 12, abs=0.002)
    assert torch.stack([many[0, 1:], many[0, :-1]]).corrcoef()[0, 1].abs() < 0.02


def numbers(samples: list[int], *, batch_first: bool = False, step: int = 3, layer: int = 2, seed: int = 7) -> Tensor:
    """``[sample, position, COUNT]``."""
    grid = TokenGrid(len(samples), batch_first)
    context = RoutingContext(sample_B=torch.tensor(samples), step=step, seed=seed)
    key_T = keyed.token_keys(context, grid, len(samples) * S, layer, torch.device("cpu"))
    values = keyed.numbers_of(key_T, COUNT)
    return values.view(len(samples), S, COUNT) if batch_first else values.view(S, len(samples), COUNT).transpose(0, 1)


@settings(deadline=None)
@given(st.permutations(range(BATCH)), st.integers(1, BATCH), st.booleans())
def test_order_and_micro_batches_change_nothing(order: list[int], size: int, batch_first: bool) -> None:
    whole = numbers(list(range(BATCH)))
    for first in range(0, BATCH, size):
        samples = order[first : first + size]
        assert torch.equal(numbers(samples, batch_first=batch_first), whole[samples])


def test_everything_else_changes_all() -> None:
    samples = list(range(BATCH))
    found = [numbers(samples), numbers([n + BATCH for n in samples])]
    found += [numbers(samples, **{name: 9}) for name in ("step", "layer", "seed")]
    everything = torch.stack(found).flatten()
    assert len(everything.unique()) == len(everything)


def test_large_seeds_are_seeds() -> None:
    assert keyed.key_of(2**63) == keyed.key_of(0)  # taken modulo 2^63
    assert keyed.key_of(2**62) != keyed.key_of(0)
