"""Capacity: how many visits an expert accepts, and which of them.

An expert takes ``ceil(capacity * K * tokens / E)`` visits from the tokens of its scope (Fedus et al. 2021, 2101.03961,
eq. 3), counting real tokens only. The others are dropped: such a token gets nothing from that expert, and its other
weights stay what they were.

``drop`` says whom an expert serves first: ``position`` the earliest tokens, so that no token depends on later ones;
``probability`` those of largest weight (GShard's and Megatron-LM's rule), which makes a token's fate depend on tokens
that come after it. Sequence scope decides within each sequence, on all of it even where it is spread over ranks, and so
alike in every layout.
"""

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from .config import MoEConfig
from .routing import Routing, TokenGrid

Count = TypeVar("Count", int, Tensor)
LARGEST_DENOMINATOR = 1_000_000
LARGEST_BITS = 2**31 - 1  # of a float32, as a whole number


def capacity_of(config: MoEConfig, tokens: Count) -> Count:
    """Visits that an expert accepts from ``tokens`` real tokens.

    Whole-number arithmetic: 1.1 * 2 * 40 / 8 is 11, and rounding must not make it 12.
    """
    assert config.capacity is not None
    factor = Fraction(str(config.capacity)).limit_denominator(LARGEST_DENOMINATOR)
    return -(-factor.numerator * config.active * tokens // (factor.denominator * config.experts))


def rows_limit(config: MoEConfig, grid: TokenGrid, tokens: int) -> int | None:
    """Most visits that an expert can get from this rank's ``tokens``, no two of them by one token.

    None where sizes follow the visits (``moe.padded`` is off). It counts masked tokens as real, since how many there
    are is only known on the device.
    """
    if not config.padded:
        return None
    ranks = 1 if grid.group is None else grid.group.size()
    if config.capacity_scope == "micro_batch":
        return min(tokens, capacity_of(config, tokens * ranks))
    length = tokens // max(grid.sequences, 1)
    return grid.sequences * min(length, capacity_of(config, length * ranks))


def within_capacity(routing: Routing, grid: TokenGrid, config: MoEConfig) -> Routing:
    """``routing`` without the visits that exceed their expert's capacity: index -1, weight 0.

    Ties go to the earlier position, then to the earlier sequence. ``visits_BE`` still counts every visit.
    """
    if config.capacity is None:
        return routing
    dropped_TK = ~_fitting(routing, grid, config)
    return replace(
        routing,
        index_TK=routing.index_TK.masked_fill(dropped_TK, -1),
        weight_TK=routing.weight_TK.masked_fill(dropped_TK, 0),
    )


@torch.no_grad()
def _fitting(routing: Routing, grid: TokenGrid, config: MoEConfig) -> Tensor:
    """Whether an expert serves the visit, ``[T, K]``."""
    index_TK = routing.index_TK
    real_T1 = torch.ones_like(index_TK[:, :1], dtype=torch.bool) if grid.mask_T is None else grid.mask_T.unsqueeze(-1)
    legal_TK = real_T1 & (index_TK >= 0) & (index_TK < config.experts)
    here = [
        _by_position(values, grid)
        for values in (index_TK.masked_fill(~legal_TK, -1), routing.weight_TK.float(), real_T1)
    ]
    (index_SBK, weight_SBK, real_SB1), first = _gather(here, grid)
    fits_SBK = _first_in_line(index_SBK, weight_SBK, real_SB1.squeeze(-1).sum(dim=0), config)
    fits_SBK = fits_SBK[first : first + here[0].shape[0]]
    return (fits_SBK.transpose(0, 1) if grid.batch_first else fits_SBK).reshape(index_TK.shape)


def _first_in_line(index_SBK: Tensor, weight_SBK: Tensor, tokens_B: Tensor, config: MoEConfig) -> Tensor:
    """Whether a visit is among the first ``capacity`` ones of its expert within its scope, ``[S, B, K]``.

    Args:
        index_SBK: expert of each visit or -1.
        weight_SBK: not negative, float32; what is not a number has some place in the line.
        tokens_B: real tokens of each sequence.
    """
    scope_B = torch.arange(len(tokens_B), device=tokens_B.device)
    if config.capacity_scope == "micro_batch":
        scope_B, tokens_B = torch.zeros_like(scope_B), tokens_B.sum(dim=0, keepdim=True)
    # A cell is an expert within a scope; visits of no expert share one more cell, of capacity 0.
    cell_SBK = scope_B.view(-1, 1) * config.experts + index_SBK
    key_SBK = cell_SBK.masked_fill(index_SBK < 0, len(tokens_B) * config.experts) << 32
    if config.drop == "probability":
        # Below the cell's bits those of the weight, which order as the weights do, the largest first.
        key_SBK = key_SBK + (LARGEST_BITS - weight_SBK.view(torch.int32).long())
    ordered_V, visit_V = torch.sort(key_SBK.flatten(), stable=True)
    cell_V = ordered_V >> 32
    place_V = torch.arange(len(cell_V), device=cell_V.device) - torch.searchsorted(cell_V, cell_V)
    limit_B = F.pad(capacity_of(config, tokens_B), (0, 1))
    fits_V = torch.empty_like(cell_V, dtype=torch.bool)
    fits_V[visit_V] = place_V < limit_B[cell_V // config.experts]
    return fits_V.view_as(index_SBK)


def _by_position(values_TX: Tensor, grid: TokenGrid) -> Tensor:
    """``[T, X] -> [S, B, X]``."""
    length = values_TX.shape[0] // max(grid.sequences, 1)
    if grid.batch_first:
        return values_TX.view(grid.sequences, length, -1).transpose(0, 1).contiguous()
    return values_TX.view(length, grid.sequences, -1)


def _gather(here: Sequence[Tensor], grid: TokenGrid) -> tuple[Sequence[Tensor], int]:
    """(whole sequences, where this rank's part begins): each rank of the group holds an equal run of positions."""
    if grid.group is None:
        return here, 0
    packed_SBX = torch.cat([values.double() for values in here], dim=-1)  # float64 holds all of them without loss
    parts = [torch.empty_like(packed_SBX) for _ in range(grid.group.size())]
    dist.all_gather(parts, packed_SBX, group=grid.group)
    whole = torch.cat(parts).split([values.shape[-1] for values in here], dim=-1)
    first = dist.get_rank(grid.group) * packed_SBX.shape[0]
    return [values.to(mine.dtype) for values, mine in zip(whole, here, strict=True)], first
