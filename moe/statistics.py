"""Router statistics of a step: accumulated over micro-batches as one vector, summed over ranks, then summarised.

The vector of a layer is ``[visits of each expert, dropped visits, load-balance loss, sequences, z-loss, entropy,
tokens]``, sums throughout, so that statistics do not depend on how a batch is spread. Visits are those that the router
wanted, dropped ones included.
"""

import math
from typing import Any

import torch
from torch import Tensor

from .balance import Losses
from .routing import Routing, TokenGrid

EXTRA = 6  # entries behind the visits


@torch.no_grad()
def statistics_vector(routing: Routing, served: Routing, losses: Losses, grid: TokenGrid) -> Tensor:
    """This micro-batch's share of the step's statistics, ``[E + 6]`` float32.

    The load-balance loss is the same on every rank that shares the sequences, so each rank adds its share of it.

    Args:
        served: ``routing`` without the visits that were dropped.
    """
    ranks = 1 if grid.group is None else torch.distributed.get_world_size(grid.group)
    visits_E = routing.visits_BE.sum(dim=0)
    sequences = routing.visits_BE.shape[0] / ranks
    extra = [
        visits_E.sum() - (served.index_TK >= 0).sum(),
        losses.aux * sequences,
        visits_E.new_full((), sequences),
        losses.z_sum,
        routing.entropy_T.sum(),
        visits_E.new_full((), routing.entropy_T.numel()) if grid.mask_T is None else grid.mask_T.sum(),
    ]
    return torch.cat([visits_E, torch.stack([value.to(visits_E.dtype) for value in extra])])


def summarise(layer: int, vector: Tensor) -> dict[str, Any]:
    """Record entry of one layer from its summed vector.

    Returns:
        max_violation: largest load over mean load, minus 1 (0 = perfect); cv: standard deviation of the loads over
        their mean; entropy: of the router's probabilities, nats a token, mean; dropped: share of visits that exceeded
        an expert's capacity; dead: experts without a visit; p95_load: 95th percentile of load over mean load. Loads
        are counted before dropping.
    """
    visits_E = vector[:-EXTRA].double()
    dropped, *_, entropy, tokens = vector[-EXTRA:].tolist()
    mean = visits_E.mean().item()
    relative_E = visits_E / mean if mean > 0 else visits_E
    return {
        "layer": layer,
        "max_violation": relative_E.max().item() - 1,
        "cv": relative_E.std(correction=0).item(),
        "entropy": entropy / max(tokens, 1),
        "dropped": dropped / max(visits_E.sum().item(), 1),
        "dead": (visits_E == 0).double().mean().item(),
        "p95_load": _quantile(relative_E, 0.95),
    }


def mean_losses(vectors: Tensor) -> tuple[float, float]:
    """(load-balance loss, z-loss) of a step, means over the layers of ``vectors [L, E + 6]``, before coefficients."""
    _, aux_L, sequences_L, z_L, _, tokens_L = vectors[:, -EXTRA:].double().unbind(dim=1)
    return (aux_L / sequences_L).mean().item(), (z_L / tokens_L.clamp(min=1)).mean().item()


def _quantile(values: Tensor, share: float) -> float:
    """The smallest value that at least ``share`` of the values do not exceed."""
    ordered = values.sort().values
    return ordered[math.ceil(share * len(ordered)) - 1].item()
