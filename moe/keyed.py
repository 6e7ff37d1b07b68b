"""Random numbers that are functions of what they are for, so that no layout, order or micro-batch changes them.

A key is 64 bits; each further number is mixed into it with SplitMix64 (Steele, Lea & Flood 2014, "Fast splittable
pseudorandom number generators", figure 17), in int64 arithmetic, which wraps like the unsigned one.
"""

import torch
from torch import Tensor

from .context import RoutingContext
from .routing import TokenGrid

_GAMMA = -7046029254386353131  # 0x9E3779B97F4A7C15
_FIRST = -4658895280553007687  # 0xBF58476D1CE4E5B9
_SECOND = -7723592293110705685  # 0x94D049BB133111EB


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def extend(key: Tensor, number: Tensor | int) -> Tensor:
    """The key that follows from ``key`` and ``number`` (at least 0); they broadcast. Tensors are int64."""
    x = key + (number + 1) * _GAMMA
    x = (x ^ _shift(x, 30)) * _FIRST
    x = (x ^ _shift(x, 27)) * _SECOND
    return x ^ _shift(x, 31)


def key_of(*numbers: int) -> Tensor:
    """The key of some numbers, a scalar on CPU."""
    key = torch.zeros((), dtype=torch.int64)
    for number in numbers:
        key = extend(key, torch.tensor(number % (1 << 63)))
    return key


def uniform(key: Tensor) -> Tensor:
    """A number inside (0, 1) for each key, float32: the middle of one of 2^23 steps, exactly."""
    return (_shift(key, 41).float() + 0.5) * 2.0**-23


def numbers_of(key_T: Tensor, count: int) -> Tensor:
    """``count`` keys for each key: ``[T] -> [T, count]``."""
    return extend(key_T.unsqueeze(-1), torch.arange(count, device=key_T.device))


def first_position(grid: TokenGrid, length: int) -> int:
    """Position of this rank's first tokens, of which each sequence has ``length`` here."""
    return 0 if grid.group is None else length * torch.distributed.get_rank(grid.group)


def token_keys(
    context: RoutingContext | None, grid: TokenGrid, tokens: int, layer: int, device: torch.device
) -> Tensor:
    """A key for each token, ``[T]``, from (seed, step, layer, sample, position).

    Without a context, or without samples in it, sequences are numbered as they lie in the batch.
    """
    context = context or RoutingContext()
    length = tokens // max(grid.sequences, 1)
    first = first_position(grid, length)
    position_S = torch.arange(first, first + length, device=device)
    sample_B = torch.arange(grid.sequences, device=device) if context.sample_B is None else context.sample_B
    key_B = extend(key_of(context.seed, context.step, layer), sample_B)
    return flat(extend(key_B.unsqueeze(-1), position_S), grid)


def flat(values_BS: Tensor, grid: TokenGrid) -> Tensor:
    """``[B, S]`` in the order of the grid's tokens, ``[T]``."""
    return (values_BS if grid.batch_first else values_BS.transpose(0, 1)).reshape(-1)
