"""Router statistics from vectors whose loads are known."""

import math
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moescale.moe import MoEConfig
from moescale.moe.capacity import within_capacity
from moescale.moe.routing import TokenGrid
from moescale.moe.statistics import EXTRA, mean_losses, summarise


def vector(
    visits: list[float], dropped: float = 0, aux: float = 2, sequences: float = 2, z: float = 12, entropy: float = 9
) -> torch.Tensor:
    return torch.tensor([*visits, dropped, aux, sequences, z, entropy, 6.0])


def test_even_loads() -> None:
    found = summarise(3, vector([5, 5, 5, 5]))
    assert found == {
        "layer": 3,
        "max_violation": 0.0,
        "cv": 0.0,
        "entropy": 1.5,
        "dropped": 0.0,
        "dead": 0.0,
        "p95_load": 1.0,
    }


def test_uneven_loads() -> None:
    found = summarise(0, vector([8, 0, 4, 0]))
    assert found["max_violation"] == pytest.approx(8 / 3 - 1)
    assert found["cv"] == pytest.approx(math.sqrt(((8 - 3) ** 2 + 9 + 1 + 9) / 4) / 3)
    assert found["dead"] == 0.5
    assert found["p95_load"] == pytest.approx(8 / 3)


def test_p95_leaves_out_the_top_twentieth() -> None:
    visits = [1.0] * 38 + [11.0] * 2
    assert summarise(0, vector(visits))["p95_load"] == pytest.approx(1 / 1.5)
    assert summarise(0, vector([1.0] * 37 + [11.0] * 3))["p95_load"] == pytest.approx(11 / 1.75)


def test_no_visits_at_all() -> None:
    found = summarise(0, torch.zeros(4 + EXTRA))
    assert (found["dead"], found["dropped"]) == (1.0, 0.0)
    assert all(math.isfinite(value) for value in found.values())


def test_dropped_is_a_share_of_all_visits() -> None:
    """Loads are counted before dropping: a full expert is overloaded, not busy."""
    found = summarise(0, vector([6, 0, 3, 3], dropped=3))
    assert found["dropped"] == 0.25
    assert found["max_violation"] == 1.0


def test_mean_losses() -> None:
    """Each layer's load-balance loss is a mean over sequences, its z-loss over tokens; then means over layers."""
    aux, z_loss = mean_losses(torch.stack([vector([1, 1], aux=2, z=12), vector([1, 1], aux=6, z=6)]))
    assert aux == pytest.approx((1 + 3) / 2)
    assert z_loss == pytest.approx((2 + 1) / 2)


def test_a_layers_own_statistics(make_layer) -> None:
    config = MoEConfig(experts=6, active=2, expert_width=8)
    layer = make_layer(16, config)
    x = torch.randn(10, 4, 16, generator=torch.Generator().manual_seed(3))
    output = layer(x)
    found = layer.take_statistics()
    assert len(found) == 6 + EXTRA
    logits = x.flatten(0, 1) @ layer.router.weight.T
    probs = torch.softmax(logits, dim=-1)
    visits = torch.bincount(probs.topk(2).indices.flatten(), minlength=6)
    assert found[:6].tolist() == visits.tolist()
    dropped, aux, sequences, z_sum, entropy, tokens = found[6:].tolist()
    assert (dropped, sequences, tokens) == (0, 4, 40)
    assert entropy == pytest.approx(-(probs * probs.log()).sum().item(), rel=1e-5)
    assert z_sum == pytest.approx(logits.logsumexp(dim=-1).square().sum().item(), rel=1e-5)
    assert output.loss.item() == pytest.approx(0.01 * aux / 4 + 0.001 * z_sum / 40, rel=1e-5)


@pytest.mark.parametrize("drop", ["probability", "position"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_layers_dropped_visits(drop: Any, masked: bool, make_layer: Any) -> None:
    config = MoEConfig(experts=6, active=2, expert_width=8, capacity=0.75, drop=drop)
    layer = make_layer(16, config)
    x = torch.randn(10, 4, 16, generator=torch.Generator().manual_seed(3))
    mask = torch.rand(10, 4, generator=torch.Generator().manual_seed(4)) > 0.3 if masked else None
    layer(x, mask)
    found = layer.take_statistics()
    grid = TokenGrid(4, mask_T=None if mask is None else mask.flatten())
    routing = layer.router(x.flatten(0, 1), grid)
    served = int((within_capacity(routing, grid, config).index_TK >= 0).sum())
    real = 40 if mask is None else int(mask.sum())
    assert found[:6].sum() == 2 * real
    assert found[6] == 2 * real - served > 0
    assert summarise(0, found)["dropped"] == pytest.approx(1 - served / (2 * real))


def test_dropped_visits_are_counted_once_under_recomputation(make_layer: Any) -> None:
    layer = make_layer(16, MoEConfig(experts=6, active=2, expert_width=8, capacity=0.75))
    x = torch.randn(10, 4, 16, generator=torch.Generator().manual_seed(3)).requires_grad_()
    layer(x).hidden.sum().backward()
    plain = layer.take_statistics()
    checkpoint(lambda t: layer(t).hidden, x, use_reentrant=True).sum().backward()
    assert torch.equal(layer.take_statistics(), plain)
