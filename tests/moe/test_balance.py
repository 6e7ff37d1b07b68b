"""Balancing losses and bias: values that can be done in one's head, plain loops, and what they are additive over."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moescale.moe import MoEConfig
from moescale.moe.balance import Balance, Losses
from moescale.moe.routing import Routing, TokenGrid, route

SCOPES = ("sequence", "global", "micro_batch")


def config_of(experts: int, active: int = 1, **more: Any) -> MoEConfig:
    return MoEConfig(experts=experts, active=active, expert_width=8, **more)


def topk(logits_TE: Tensor, active: int, grid: TokenGrid) -> Routing:
    return route(logits_TE, grid, active=active, score="softmax")


def aux_of(logits_TE: Tensor, active: int, grid: TokenGrid, load_E: Tensor | None = None, **more: Any) -> float:
    balance = Balance(config_of(logits_TE.shape[1], active, **more))
    if load_E is not None:
        balance.observe(load_E)
    return balance.loss(topk(logits_TE, active, grid), grid).aux.item()


def even(tokens: int, experts: int) -> Tensor:
    """Every expert visited and scored alike: token t prefers expert t mod E, then the next ones."""
    preference_E = torch.arange(experts - 1.0, -1, -1)
    return torch.stack([preference_E.roll(t) for t in range(tokens)])


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("active", [1, 2, 3, 4])
def test_uniform_routing_costs_one(scope: str, active: int) -> None:
    for grid in (TokenGrid(1), TokenGrid(6, batch_first=True)):
        assert math.isclose(aux_of(even(24, 4), active, grid, balance=scope), 1.0, rel_tol=1e-6)


@pytest.mark.parametrize("scope", SCOPES)
def test_collapse_onto_k_experts_costs_e_over_k(scope: str) -> None:
    logits = torch.tensor([50.0, 49.0, 0.0, 0.0, 0.0, 0.0]).repeat(12, 1)
    for active, share in ((1, torch.softmax(logits[0], 0)[0].item()), (2, 1.0)):
        load_E = torch.zeros(6)
        load_E[:active] = 12
        found = aux_of(logits, active, TokenGrid(3), load_E, balance=scope)
        assert math.isclose(found, 6 / active * share, rel_tol=1e-5)


def loops(logits_BSE: Tensor, mask_BS: Tensor, active: int, scope: str, load_E: Tensor) -> float:
    """The load-balance loss as its definition reads."""
    experts = logits_BSE.shape[-1]
    sets = [[(b, s) for s in range(logits_BSE.shape[1]) if mask_BS[b, s]] for b in range(len(logits_BSE))]
    if scope == "micro_batch":
        sets = [[token for tokens in sets for token in tokens]]
    found = []
    for tokens in sets:
        probs = [torch.softmax(logits_BSE[token], dim=0) for token in tokens]
        loss = 0.0
        for i in range(experts):
            visits = sum(i in p.argsort(descending=True)[:active].tolist() for p in probs)
            share = visits / max(active * len(tokens), 1)
            if scope == "global":
                share = load_E[i].item() / load_E.sum().item() if load_E.sum() else 1 / experts
            loss += experts * share * sum(p[i].item() for p in probs) / max(len(tokens), 1)
        found.append(loss)
    return sum(found) / len(found)


@settings(deadline=None)
@given(
    st.sampled_from(SCOPES), st.integers(1, 4), st.integers(1, 6), st.integers(1, 5), st.booleans(),
    st.integers(0, 10**6),
)  # fmt: skip
def test_loss_is_its_definition(
    scope: str, sequences: int, length: int, experts: int, batch_first: bool, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    active = 1 + seed % experts
    logits_BSE = torch.randn(sequences, length, experts, generator=draw)
    mask_BS = torch.rand(sequences, length, generator=draw) > 0.3
    load_E = torch.randint(0, 9, (experts,), generator=draw).float() * (seed % 3 > 0)
    order = (lambda t: t) if batch_first else (lambda t: t.transpose(0, 1))
    grid = TokenGrid(sequences, batch_first, order(mask_BS).flatten())
    found = aux_of(order(logits_BSE).reshape(-1, experts), active, grid, load_E, balance=scope)
    assert math.isclose(found, loops(logits_BSE, mask_BS, active, scope, load_E), rel_tol=1e-5, abs_tol=1e-6)


def gradient_of(logits_BSE: Tensor, balance: Balance, active: int, cuts: list[int]) -> Tensor:
    """Gradient of the mean over micro-batches of ``cuts`` sequences, weighted by their sizes."""
    logits = logits_BSE.clone().requires_grad_()
    loss = torch.zeros(())
    for part in logits.split(cuts):
        grid = TokenGrid(len(part), batch_first=True)
        loss = loss + balance.loss(topk(part.flatten(0, 1), active, grid), grid).total * len(part) / len(logits)
    (found,) = torch.autograd.grad(loss, logits)
    return found


@pytest.mark.parametrize("scope", ["sequence", "global", "none"])
def test_gradients_do_not_depend_on_micro_batches(scope: str) -> None:
    balance = Balance(config_of(5, 2, balance=scope, aux_loss=0.7, z_loss=0.3))
    balance.observe(torch.tensor([5.0, 1.0, 0.0, 2.0, 4.0]))
    logits = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0))
    whole = gradient_of(logits, balance, 2, [4])
    for cuts in ([1, 1, 1, 1], [2, 2], [1, 3]):
        torch.testing.assert_close(gradient_of(logits, balance, 2, cuts), whole)


def test_micro_batch_scope_does_depend_on_them() -> None:
    """That is why it is there: to compare with frameworks that do this. See the layout contract."""
    balance = Balance(config_of(5, 2, balance="micro_batch", aux_loss=0.7))
    logits = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0))
    difference = gradient_of(logits, balance, 2, [4]) - gradient_of(logits, balance, 2, [1, 1, 1, 1])
    assert difference.abs().max() > 1e-4


@pytest.mark.parametrize("scope", SCOPES)
def test_balancing_pushes_probability_away_from_crowded_experts(scope: str) -> None:
    balance = Balance(config_of(3, balance=scope))
    balance.observe(torch.tensor([6.0, 0.0, 0.0]))
    logits = torch.tensor([[2.0, 0.0, 0.0]]).repeat(6, 1).requires_grad_()
    grid = TokenGrid(1)
    (gradient,) = torch.autograd.grad(balance.loss(topk(logits, 1, grid), grid).aux, logits)
    assert (gradient[:, 0] > 0).all()
    assert (gradient[:, 1:] < 0).all()


def test_global_scope_without_counts_teaches_nothing() -> None:
    """Uniform f times probabilities that sum to one: 1, whatever they are."""
    logits = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    grid = TokenGrid(2)
    aux = Balance(config_of(4, balance="global")).loss(topk(logits, 2, grid), grid).aux
    assert aux.item() == pytest.approx(1.0)
    (gradient,) = torch.autograd.grad(aux, logits)
    assert gradient.abs().max() < 1e-7


def losses_of(logits: Tensor, grid: TokenGrid, **more: Any) -> Losses:
    return Balance(config_of(logits.shape[1], **more)).loss(topk(logits, 1, grid), grid)


def test_z_loss_is_the_squared_log_partition() -> None:
    logits = torch.tensor([[0.0, 0.0], [1.0, 1.0], [9.0, 9.0]])
    grid = TokenGrid(1, mask_T=torch.tensor([True, True, False]))
    expected = math.log(2) ** 2 + (1 + math.log(2)) ** 2
    losses = losses_of(logits, grid, balance="none", z_loss=0.5)
    assert losses.z_sum.item() == pytest.approx(expected)
    assert losses.total.item() == pytest.approx(0.5 * expected / 2)


def test_total_is_the_weighted_sum() -> None:
    logits, grid = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), TokenGrid(2)
    for scope in SCOPES:
        losses = losses_of(logits, grid, balance=scope, aux_loss=0.3, z_loss=0.2)
        assert losses.total.item() == pytest.approx(0.3 * losses.aux.item() + 0.2 * losses.z_sum.item() / 6)
    untrained = losses_of(logits, grid, balance="none", aux_loss=0.3, z_loss=0)
    assert untrained.total == 0
    assert untrained.aux == losses_of(logits, grid).aux


@pytest.mark.parametrize("scope", SCOPES)
def test_nothing_real_costs_nothing(scope: str) -> None:
    losses = losses_of(torch.randn(6, 4), TokenGrid(2, mask_T=torch.zeros(6, dtype=torch.bool)), balance=scope)
    assert (losses.total, losses.aux, losses.z_sum) == (0, 0, 0)


def test_bias_moves_by_its_rate_towards_equal_loads() -> None:
    balance = Balance(config_of(4, bias_rate=0.25))
    assert balance.bias_E is not None
    balance.observe(torch.tensor([6.0, 2.0, 4.0, 4.0]))
    assert balance.bias_E.tolist() == [-0.25, 0.25, 0, 0]
    balance.observe(torch.tensor([0.0, 2.0, 0.0, 14.0], dtype=torch.float64))
    assert balance.bias_E.tolist() == [0, 0.5, 0.25, -0.25]


@pytest.mark.parametrize("score", ["softmax", "sigmoid_normalized"])
def test_bias_alone_balances_a_router_that_starts_lopsided(score: Any) -> None:
    """Wang et al. 2024: no loss, the router's scores stay as they are."""
    balance = Balance(config_of(8, 2, bias_rate=0.005, balance="none", aux_loss=0))
    logits = torch.randn(512, 8, generator=torch.Generator().manual_seed(0)) + torch.linspace(-1, 1, 8)
    grid, worst = TokenGrid(4), []
    for _ in range(100):
        visits_E = route(logits, grid, active=2, score=score, bias_E=balance.bias_E).visits_BE.sum(dim=0)
        worst.append((visits_E.max() / visits_E.mean() - 1).item())
        balance.observe(visits_E)
    assert worst[0] > 0.8
    assert max(worst[-10:]) < 0.2


def test_only_what_is_used_is_carried() -> None:
    assert not Balance(config_of(4)).state_dict()
    assert list(Balance(config_of(4, bias_rate=1e-3)).state_dict()) == ["bias_E"]
    assert list(Balance(config_of(4, balance="global")).state_dict()) == ["load_E"]
    idle = Balance(config_of(4))
    idle.observe(torch.ones(4))
    assert (idle.bias_E, idle.load_E) == (None, None)


@pytest.mark.parametrize("move", [lambda m: m.bfloat16(), lambda m: m.to(torch.float16), lambda m: m.half().cpu()])
def test_buffers_stay_in_float32(move: Callable[[Balance], Balance]) -> None:
    """Megatron and DeepSpeed cast whole modules; 1e-3 steps and counts above 256 do not survive bfloat16."""
    balance = Balance(config_of(2, bias_rate=1e-3, balance="global"))
    balance.observe(torch.tensor([1001.0, 3.0]))
    before = {name: buffer.clone() for name, buffer in balance.state_dict().items()}
    for name, buffer in move(balance).state_dict().items():
        assert buffer.dtype == torch.float32
        assert torch.equal(buffer, before[name])
    assert {b.dtype for b in balance.double().state_dict().values()} == {torch.float64}
