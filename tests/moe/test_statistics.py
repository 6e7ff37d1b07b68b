"""Router statistics from vectors whose loads are known."""

import math

import pytest
import torch

from moescale.moe import MoEConfig
from moescale.moe.statistics import mean_losses, summarise


def vector(visits: list[float], aux: float = 2.0, sequences: float = 2.0, z: float = 12.0, entropy: float = 9.0):
    return torch.tensor([*visits, aux, sequences, z, entropy, 6.0])


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
    found = summarise(0, torch.zeros(4 + 5))
    assert found["dead"] == 1.0
    assert all(math.isfinite(value) for value in found.values())


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
    logits = x.flatten(0, 1) @ layer.router.weight.T
    probs = torch.softmax(logits, dim=-1)
    visits = torch.bincount(probs.topk(2).indices.flatten(), minlength=6)
    assert found[:6].tolist() == visits.tolist()
    aux, sequences, z_sum, entropy, tokens = found[6:].tolist()
    assert (sequences, tokens) == (4, 40)
    assert entropy == pytest.approx(-(probs * probs.log()).sum().item(), rel=1e-5)
    assert z_sum == pytest.approx(logits.logsumexp(dim=-1).square().sum().item(), rel=1e-5)
    assert output.loss.item() == pytest.approx(0.01 * aux / 4 + 0.001 * z_sum / 40, rel=1e-5)
