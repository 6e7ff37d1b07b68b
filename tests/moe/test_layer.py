"""The layer against a loop over tokens and their experts, written as the papers write it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moescale.moe import MoEConfig, MoELayer

Make = Callable[..., MoELayer]
S, B, D = 7, 3, 16

CONFIGS = {
    "top 1": MoEConfig(experts=4, active=1, expert_width=8),
    "top 2, fine": MoEConfig(experts=8, active=2, granularity=8),
    "normalized": MoEConfig(experts=5, active=3, expert_width=24, score="softmax_normalized"),
    "shared": MoEConfig(experts=4, active=2, expert_width=8, shared=2),
    "every expert": MoEConfig(experts=3, active=3, expert_width=8),
    "one expert": MoEConfig(experts=1, active=1, expert_width=8),
    "no balancing": MoEConfig(experts=4, active=2, expert_width=8, balance="none", z_loss=0),
    "strong losses": MoEConfig(experts=4, active=2, expert_width=8, aux_loss=3.0, z_loss=0.7),
}


def swiglu(x_D: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    gate_F, up_F = (w_in @ x_D).chunk(2)
    return w_out @ (gate_F * torch.sigmoid(gate_F) * up_F)


def mix_one(x_D: Tensor, layer: MoELayer) -> tuple[Tensor, Tensor, list[int], Tensor]:
    """One token: (output, probabilities, experts visited, z-loss)."""
    config = layer.config
    scores_E = layer.router.weight @ x_D
    probs_E = torch.softmax(scores_E, dim=0)
    order = probs_E.argsort(descending=True).tolist()
    chosen = order[: config.active]
    if config.active < config.experts:
        margin = probs_E[chosen[-1]] - probs_E[order[config.active]]
        assert margin > 1e-5, "these inputs put two experts too close to judge anything"
    total = sum(probs_E[e] for e in chosen) if config.score == "softmax_normalized" else 1.0
    y_D = sum(probs_E[e] / total * swiglu(x_D, layer.experts.w_in[e], layer.experts.w_out[e]) for e in chosen)
    if layer.shared is not None:
        y_D = y_D + swiglu(x_D, layer.shared.w_in, layer.shared.w_out)
    return y_D, probs_E, chosen, torch.logsumexp(scores_E, dim=0) ** 2


def reference(x_SBD: Tensor, layer: MoELayer) -> tuple[Tensor, Tensor]:
    """Output and loss of the layer in plain loops."""
    config = layer.config
    y_SBD, balance, z_loss = torch.empty_like(x_SBD), [], []
    for b in range(x_SBD.shape[1]):
        visits_E, probs_E = torch.zeros(config.experts, dtype=x_SBD.dtype), 0
        outputs = []
        for s in range(x_SBD.shape[0]):
            y_D, token_probs_E, chosen, token_z = mix_one(x_SBD[s, b], layer)
            outputs.append(y_D)
            visits_E[chosen] += 1
            probs_E = probs_E + token_probs_E
            z_loss.append(token_z)
        y_SBD[:, b] = torch.stack(outputs)
        share_E = visits_E / (config.active * x_SBD.shape[0])
        balance.append(config.experts * (share_E * probs_E / x_SBD.shape[0]).sum())
    loss = config.z_loss * sum(z_loss) / len(z_loss)
    if config.balance == "sequence":
        loss = loss + config.aux_loss * sum(balance) / len(balance)
    return y_SBD, loss


def gradients(layer: MoELayer, x: Tensor, y: Tensor, loss: Tensor) -> dict[str, Tensor]:
    probe = torch.randn(y.shape, generator=torch.Generator().manual_seed(9))
    wanted = {"x": x, **dict(layer.named_parameters())}
    found = torch.autograd.grad((y * probe.to(y.dtype)).sum() + loss, list(wanted.values()))
    return {"y": y.detach(), "loss": loss.detach(), **dict(zip(wanted, found, strict=True))}


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_close(found: Tensor, expected: Tensor, name: str, bound: float = 1e-5) -> None:
    """Relative to the largest expected value."""
    scale = expected.abs().max().clamp(min=1e-12)
    worst = (found.double() - expected.double()).abs().max() / scale
    assert worst < bound, f"{name} differs by {worst:.2e} of its largest value"


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_layer_is_the_reference(config: MoEConfig, make_layer: Make) -> None:
    layer = make_layer(D, config)
    x = draw(S, B, D).requires_grad_()
    output = layer(x)
    found = gradients(layer, x, output.hidden, output.loss)
    exact = make_layer(D, config).double()
    exact.load_state_dict(layer.double().state_dict())
    x_exact = draw(S, B, D).double().requires_grad_()
    expected = gradients(exact, x_exact, *reference(x_exact, exact))
    for name in expected:
        # One expert's probability is always 1, so only the z-loss teaches the router: a small sum of large terms.
        bound = 2e-4 if config.experts == 1 and name == "router.weight" else 1e-5
        assert_close(found[name], expected[name], name, bound)


@pytest.mark.parametrize("masked", [False, True])
def test_batch_first_is_the_same_layer(masked: bool, make_layer: Make) -> None:
    config = CONFIGS["shared"]
    sequence_first, batch_first = make_layer(D, config), make_layer(D, config, batch_first=True)
    x = draw(S, B, D)
    mask = torch.rand(S, B, generator=torch.Generator().manual_seed(2)) > 0.4 if masked else None
    first = sequence_first(x, mask)
    second = batch_first(x.transpose(0, 1), None if mask is None else mask.T)
    torch.testing.assert_close(second.hidden.transpose(0, 1), first.hidden)
    torch.testing.assert_close(second.loss, first.loss)
    torch.testing.assert_close(batch_first.take_statistics(), sequence_first.take_statistics())


def test_masked_tokens_give_zeros_and_count_nowhere(make_layer: Make) -> None:
    """Loss, output and statistics are those of each sequence's real tokens alone, however many each has."""
    config = CONFIGS["shared"]
    layer = make_layer(D, config)
    x = draw(S, B, D)
    mask = torch.tensor([[s < length for length in (7, 4, 1)] for s in range(S)])
    masked = layer(x, mask)
    statistics = layer.take_statistics()
    assert masked.hidden[~mask].abs().max() == 0
    visits, aux, z_sum, tokens = torch.zeros(config.experts), 0.0, 0.0, 0.0
    for b in range(B):
        alone = layer(x[mask[:, b], b].unsqueeze(1))
        torch.testing.assert_close(masked.hidden[mask[:, b], b], alone.hidden[:, 0])
        vector = layer.take_statistics()
        visits += vector[: config.experts]
        aux, z_sum, tokens = aux + vector[-5], z_sum + vector[-3], tokens + vector[-1]
    torch.testing.assert_close(statistics[: config.experts], visits)
    assert statistics[-1] == tokens == 12
    torch.testing.assert_close(masked.loss, config.aux_loss * aux / B + config.z_loss * z_sum / tokens)


def test_masked_tokens_get_no_gradient_and_give_none(make_layer: Make) -> None:
    layer = make_layer(D, CONFIGS["shared"])
    x = draw(S, B, D).requires_grad_()
    mask = torch.ones(S, B, dtype=torch.bool)
    mask[4:, 1] = False
    output = layer(x, mask)
    (output.hidden.sum() + output.loss).backward()
    assert x.grad is not None
    assert x.grad[~mask].abs().max() == 0
    assert x.grad[mask].abs().min() > 0
    before = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    changed = torch.where(mask.unsqueeze(-1), x.detach(), torch.tensor(50.0))
    output = layer(changed, mask)
    (output.hidden.sum() + output.loss).backward()
    for parameter, gradient in zip(layer.parameters(), before, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_everything_masked_is_legal(make_layer: Make) -> None:
    layer = make_layer(D, CONFIGS["shared"])
    output = layer(draw(S, B, D), torch.zeros(S, B, dtype=torch.bool))
    assert output.hidden.abs().max() == 0
    assert output.loss == 0


def test_a_rank_without_tokens(make_layer: Make) -> None:
    layer = make_layer(D, CONFIGS["shared"])
    x = draw(0, B, D).requires_grad_()
    output = layer(x)
    (output.hidden.sum() + output.loss).backward()
    assert output.hidden.shape == x.shape
    assert output.loss == 0
    assert all(p.grad is not None and p.grad.abs().max() == 0 for p in layer.parameters())


def test_routing_is_causal(make_layer: Make) -> None:
    layer = make_layer(D, CONFIGS["normalized"])
    assert layer.router.causal
    x = draw(S, B, D)
    later = x.clone()
    later[4:] = draw(S - 4, B, D, seed=5)
    torch.testing.assert_close(layer(later).hidden[:4], layer(x).hidden[:4], rtol=0, atol=1e-6)


def test_statistics_are_counted_once_under_recomputation(make_layer: Make) -> None:
    layer = make_layer(D, CONFIGS["shared"])
    x = draw(S, B, D).requires_grad_()
    layer(x).hidden.sum().backward()
    plain = layer.take_statistics()
    checkpoint(lambda t: layer(t).hidden, x, use_reentrant=True).sum().backward()
    assert torch.equal(layer.take_statistics(), plain)


def test_statistics_are_sums_over_passes_with_gradients(make_layer: Make) -> None:
    layer = make_layer(D, CONFIGS["shared"])
    first, second = draw(S, B, D), draw(S, B, D, seed=4)
    with torch.no_grad():
        layer(first)
    assert layer.statistics is None
    layer(first)
    layer(second)
    both = layer.take_statistics()
    layer(torch.cat([first, second], dim=1))
    torch.testing.assert_close(both, layer.take_statistics())
    with pytest.raises(RuntimeError, match="no forward pass with gradients"):
        layer.take_statistics()


def test_bfloat16_stays_near_float32(make_layer: Make) -> None:
    """Scores are computed in float32; the products differ by bfloat16's rounding of eight bits."""
    config = CONFIGS["shared"]
    layer = make_layer(64, config).bfloat16()
    exact = make_layer(64, config)
    exact.load_state_dict({name: tensor.float() for name, tensor in layer.state_dict().items()})
    x = draw(S, B, 64).bfloat16()
    found, expected = layer(x), exact(x.float())
    assert found.hidden.dtype == torch.bfloat16
    torch.testing.assert_close(found.loss, expected.loss)
    assert_close(found.hidden, expected.hidden, "output", bound=2e-2)


def test_shapes_and_expert_count_are_checked(make_layer: Make) -> None:
    class Three:
        size, rank = 3, 0

    with pytest.raises(ValueError, match=r"ranks \(3\) must divide moe.experts \(4\)"):
        MoELayer(D, CONFIGS["shared"], exchange=Three())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"moe.expert_width \(12\) must be a multiple of 8; try 8 or 16"):
        MoELayer(D, MoEConfig(experts=2, active=1, expert_width=12))
