"""Router statistics of a step: accumulated over micro-batches as one vector, summed over ranks, then summarised.

The vector of a layer is ``[visits of each expert, load-balance loss, sequences, z-loss, entropy, tokens]``, sums
throughout, so that statistics do not depend on how a batch is spread.
"""

import math
from typing import Any

import torch
from torch import Tensor

from .balance import TokenGrid
from .router import Routing

EXTRA = 5  # entries behind the visits


@torch.no_grad()
def statistics_vector(routing: Routing, visits_BE: Tensor, aux: Tensor, z_sum: Tensor, grid: TokenGrid) -> Tensor:
    """This micro-batch's share of the step's statistics, ``[E + 5]`` float32.

    The load-balance loss is the same on every rank that shares the sequences, so each rank adds its share of it.
    """
    ranks = 1 if grid.group is None else torch.distributed.get_world_size(grid.group)
    entropy_T = routing.logsumexp_T - (routing.probs_TE * routing.logits_TE).sum(dim=-1)
    if grid.mask_T is None:
        entropy, tokens = entropy_T.sum(), entropy_T.new_tensor(float(entropy_T.numel()))
    else:
        entropy, tokens = (entropy_T * grid.mask_T).sum(), grid.mask_T.sum()
    sequences = visits_BE.shape[0] / ranks
    extra = torch.stack([aux * sequences, aux.new_tensor(sequences), z_sum, entropy, tokens])
    return torch.cat([visits_BE.sum(dim=0), extra])


def summarise(layer: int, vector: Tensor) -> dict[str, Any]:
    """Record entry of one layer from its summed vector.

    Returns:
        max_violation: largest load over mean load, minus 1 (0 = perfect); cv: standard deviation of the loads over
        their mean; entropy: of the router's probabilities, nats a token, mean; dropped: share of visits that no
        expert served (0: dispatch is dropless); dead: experts without a visit; p95_load: 95th percentile of load
        over mean load; aux_loss, z_loss: means, without their coefficients.
    """
    visits_E = vector[:-EXTRA].double()
    *_, entropy, tokens = vector[-EXTRA:].tolist()
    mean = visits_E.mean().item()
    relative_E = visits_E / mean if mean > 0 else visits_E
    return {
        "layer": layer,
        "max_violation": relative_E.max().item() - 1,
        "cv": relative_E.std(correction=0).item(),
        "entropy": entropy / max(tokens, 1),
        "dropped": 0.0,
        "dead": (visits_E == 0).double().mean().item(),
        "p95_load": _quantile(relative_E, 0.95),
    }


def mean_losses(vectors: Tensor) -> tuple[float, float]:
    """(load-balance loss, z-loss) of a step, means over the layers of ``vectors [L, E + 5]``, before coefficients."""
    aux_L, sequences_L, z_L, _, tokens_L = vectors[:, -EXTRA:].double().unbind(dim=1)
    return (aux_L / sequences_L).mean().item(), (z_L / tokens_L.clamp(min=1)).mean().item()


def _quantile(values: Tensor, share: float) -> float:
    """The smallest value that at least ``share`` of the values do not exceed."""
    ordered = values.sort().values
    return ordered[math.ceil(share * len(ordered)) - 1].item()
