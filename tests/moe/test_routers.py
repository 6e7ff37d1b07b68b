"""Every router against a loop over tokens, and what it promises: causality, independence, balance."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moescale.moe import MoEConfig, MoELayer
from moescale.moe.context import RoutingContext
from moescale.moe.routers import HashRouter, Router, build_router
from moescale.moe.routing import Routing, TokenGrid

S, B, D, LAYER = 12, 4, 16, 3
AHEAD = {"grouping": "sequence", "allow_future_leak": True}
OPTIONS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "softmax, normalized": {"score": "softmax_normalized", "weight_scale": 3.0},
    "sigmoid": {"score": "sigmoid"},
    "sigmoid, normalized, scaled": {"score": "sigmoid_normalized", "weight_scale": 2.5},
    "groups by their best expert": {"groups": 3, "groups_active": 2},
    "groups by their best two": {"groups": 2, "score": "sigmoid_normalized"},
    "groups of one": {"groups": 6, "groups_active": 3, "score": "sigmoid"},
    "jitter": {"jitter": 0.3},
    "hash": {"router": "hash", "weight_scale": 1.5},
    "forced": {"router": "forced"},
    "forced, skewed": {"router": "forced", "skew": 1.2},
    "choice at a position": {"router": "expert_choice"},
    "choice at a position, sigmoid": {"router": "expert_choice", "score": "sigmoid_normalized", "active": 1},
    "choice in a sequence": {"router": "expert_choice", **AHEAD},
    "sinkhorn at a position": {"router": "sinkhorn"},
    "sinkhorn in a sequence": {"router": "sinkhorn", "score": "sigmoid", **AHEAD},
}
CONFIGS = {
    name: MoEConfig(**{"experts": 6, "active": 2, "expert_width": 8, **options}) for name, options in OPTIONS.items()
}
Visits = dict[int, float]  # weight by expert


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def made(config: MoEConfig) -> Router:
    router = build_router(D, config, LAYER)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.copy_(draw(*parameter.shape, seed=2) * 0.5)
    return router


def a_context(samples: list[int] | None = None) -> RoutingContext:
    samples = list(range(10, 10 + B)) if samples is None else samples
    ids = torch.randint(0, 50, (100, S), generator=torch.Generator().manual_seed(3))
    return RoutingContext(ids[samples], torch.tensor(samples), step=5, seed=1)


def routed(
    router: Router, x_SBD: Tensor, mask_SB: Tensor | None = None, context: RoutingContext | None = None
) -> Routing:
    grid = TokenGrid(x_SBD.shape[1], mask_T=None if mask_SB is None else mask_SB.flatten())
    return router(x_SBD.flatten(0, 1), grid, context or a_context())


def visits_of(routing: Routing) -> list[Visits]:
    """What each token visits, and that slots without a visit weigh nothing."""
    found = []
    for experts, weights in zip(routing.index_TK.tolist(), routing.weight_TK.tolist(), strict=True):
        assert all(weight == 0 for expert, weight in zip(experts, weights, strict=True) if expert < 0)
        real = [(expert, weight) for expert, weight in zip(experts, weights, strict=True) if expert >= 0]
        assert len(dict(real)) == len(real), "a token visits an expert twice"
        found.append(dict(real))
    return found


# The same in plain loops. Everything is indexed [s][b].


def split_mix(key: int, number: int) -> int:
    x = (key + (number + 1) * 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def uniform(context: RoutingContext, s: int, b: int, number: int) -> float:
    key = 0
    for part in (context.seed, context.step, LAYER, int(context.sample_B[b]), s, number):
        key = split_mix(key, part)
    return ((key >> 41) + 0.5) / 2**23


def best(values: list[float], count: int) -> list[int]:
    return sorted(range(len(values)), key=lambda i: -values[i])[:count]


def scores_of(x_D: Tensor, router: Router, factors: list[float]) -> list[float]:
    scaled_D = x_D.double() * torch.tensor(factors, dtype=torch.float64)
    logits = (router.weight.detach().double() @ scaled_D).tolist()
    if router.config.score.startswith("sigmoid"):
        return [1 / (1 + math.exp(-logit)) for logit in logits]
    total = sum(math.exp(logit) for logit in logits)
    return [math.exp(logit) / total for logit in logits]


def of_best_groups(scores: list[float], config: MoEConfig) -> list[int]:
    size = config.experts // config.groups
    two = 2 if config.score.startswith("sigmoid") else 1
    parts = [scores[g * size : (g + 1) * size] for g in range(config.groups)]
    chosen = best([sum(sorted(part, reverse=True)[:two]) for part in parts], config.groups_active)
    return [e for g in chosen for e in range(g * size, (g + 1) * size)]


def weighed(chosen: list[int], scores: list[float], config: MoEConfig) -> Visits:
    total = sum(scores[e] for e in chosen) if config.score.endswith("normalized") else 1.0
    return {e: config.weight_scale * scores[e] / total for e in chosen}


def alone(s: int, b: int, x_D: Tensor, router: Router, context: RoutingContext) -> Visits:
    """Routers for which a token is decided by itself."""
    config = router.config
    if config.router == "hash":
        token = int(context.token_ids_BS[b, s])
        key = split_mix(split_mix(split_mix(0, 0), LAYER), token // config.experts)
        drawn = [(split_mix(key, e) + 2**63) % 2**64 for e in range(config.experts)]
        order = sorted(range(config.experts), key=drawn.__getitem__)
        return {order[(token + k) % config.experts]: config.weight_scale / config.active for k in range(config.active)}
    if config.router == "forced":
        gumbel = [-math.log(-math.log(uniform(context, s, b, e))) for e in range(config.experts)]
        chosen = best([g - config.skew * math.log(e + 1) for e, g in enumerate(gumbel)], config.active)
        return {e: config.weight_scale / config.active for e in chosen}
    factors = [1 + config.jitter * (2 * uniform(context, s, b, d) - 1) for d in range(D)]
    scores = scores_of(x_D, router, factors)
    allowed = of_best_groups(scores, config)
    chosen = sorted(allowed, key=lambda e: -scores[e])[: config.active]
    return weighed(chosen, scores, config)


def together(members: list[list[float]], number: int, config: MoEConfig) -> list[list[int]]:
    """Experts of each real token of a group, from their scores."""
    if config.router == "expert_choice":
        chosen: list[list[int]] = [[] for _ in members]
        for e in range(config.experts):
            quota = (len(members) * config.active + (e + number) % config.experts) // config.experts
            for n in best([scores[e] for scores in members], quota):
                chosen[n].append(e)
        return chosen
    plan = [[_odds(score, config) for score in scores] for scores in members]
    for _ in range(4):
        plan = [[value / sum(row) for value in row] for row in plan]
        columns = [sum(row[e] for row in plan) for e in range(config.experts)]
        plan = [[value / columns[e] for e, value in enumerate(row)] for row in plan]
    return [best(row, config.active) for row in plan]


def _odds(score: float, config: MoEConfig) -> float:
    """exp of the logit, up to a factor for each token."""
    return score / (1 - score) if config.score.startswith("sigmoid") else score


def reference(x_SBD: Tensor, mask_SB: Tensor, router: Router, context: RoutingContext) -> list[Visits]:
    config = router.config
    length, batch = mask_SB.shape
    if config.router not in ("expert_choice", "sinkhorn"):
        return [
            alone(s, b, x_SBD[s, b], router, context) if mask_SB[s, b] else {}
            for s in range(length)
            for b in range(batch)
        ]
    found: list[Visits] = [{} for _ in range(length * batch)]
    across = config.grouping == "position"
    for number in range(length if across else batch):
        places = [(number, b) for b in range(batch)] if across else [(s, number) for s in range(length)]
        places = [place for place in places if mask_SB[place]]
        members = [scores_of(x_SBD[place], router, [1.0] * D) for place in places]
        for (s, b), scores, chosen in zip(
            places, members, together(members, number if across else 0, config), strict=True
        ):
            found[s * batch + b] = weighed(chosen, scores, config)
    return found


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_router_is_the_loop(name: str, masked: bool) -> None:
    router, context = made(CONFIGS[name]), a_context()
    x_SBD = draw(S, B, D)
    mask_SB = torch.rand(S, B, generator=torch.Generator().manual_seed(4)) > (0.3 if masked else -1)
    found = visits_of(routed(router, x_SBD, mask_SB if masked else None, context))
    for number, (mine, theirs) in enumerate(zip(found, reference(x_SBD, mask_SB, router, context), strict=True)):
        assert mine == pytest.approx(theirs, rel=1e-5), f"token {number}"


@pytest.mark.parametrize("name", CONFIGS)
def test_batch_first_is_the_same(name: str) -> None:
    router, x_SBD, context = made(CONFIGS[name]), draw(S, B, D), a_context()
    mask_SB = torch.rand(S, B, generator=torch.Generator().manual_seed(4)) > 0.3
    first = routed(router, x_SBD, mask_SB, context)
    second = router(x_SBD.transpose(0, 1).reshape(-1, D), TokenGrid(B, True, mask_SB.T.flatten()), context)
    as_batch_first = torch.arange(S * B).view(S, B).T.flatten()
    assert torch.equal(second.index_TK, first.index_TK[as_batch_first])
    torch.testing.assert_close(second.weight_TK, first.weight_TK[as_batch_first])
    torch.testing.assert_close(second.scored_BE, first.scored_BE)
    torch.testing.assert_close(second.visits_BE, first.visits_BE)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_token_visits_k_experts_on_average(name: str) -> None:
    config = CONFIGS[name]
    for sequences in (1, 3, B):
        routing = routed(made(config), draw(S, sequences, D), context=a_context(list(range(sequences))))
        visits = torch.stack([(routing.index_TK == e).view(S, sequences, -1).sum(dim=(0, 2)) for e in range(6)], dim=1)
        assert torch.equal(routing.visits_BE, visits.float())
        assert visits.sum() == config.active * S * sequences


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("shape", [(0, B), (S, 1), (1, B)], ids=str)
def test_any_number_of_tokens_is_legal(name: str, shape: tuple[int, int], make_layer: Callable[..., MoELayer]) -> None:
    layer = make_layer(D, CONFIGS[name])
    context = RoutingContext(torch.zeros(shape[1], shape[0], dtype=torch.int64), torch.arange(shape[1]))
    x = draw(*shape, D).requires_grad_()
    output = layer(x, None, context)
    (output.hidden.sum() + output.loss).backward()
    assert output.hidden.shape == x.shape
    assert output.hidden.isfinite().all()
    nothing = layer(x, torch.zeros(shape, dtype=torch.bool), context)
    assert nothing.hidden.abs().sum() == 0


def outputs(layer: MoELayer, x_SBD: Tensor, context: RoutingContext) -> Tensor:
    with torch.no_grad():
        return layer(x_SBD, None, context).hidden


CAPACITIES: dict[str, dict[str, Any]] = {
    "capacity by probability": {"capacity": 0.7},
    "capacity by position": {"capacity": 0.7, "drop": "position"},
    "hashed, capacity by probability": {"capacity": 0.7, "router": "hash"},
    "capacity of the micro-batch by position": {"capacity": 0.7, "drop": "position", "capacity_scope": "micro_batch"},
}
ALL = CONFIGS | {name: MoEConfig(experts=6, active=2, expert_width=8, **more) for name, more in CAPACITIES.items()}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ALL)
def test_only_declared_ones_see_later_tokens(name: str, training: bool, make_layer: Callable[..., MoELayer]) -> None:
    """Other hidden states and other tokens after position t: up to t nothing changes, or the option says so."""
    config = ALL[name]
    layer = make_layer(D, config).train(training)
    assert layer.router.causal or not config.causal
    changed = False
    for seed in range(5):
        x, context = draw(S, B, D, seed=seed), a_context()
        before = outputs(layer, x, context)
        for t in (2, 6, 9):
            later, ids = x.clone(), context.token_ids_BS.clone()
            later[t:] = 3 * draw(S - t, B, D, seed=seed + 50)
            ids[:, t:] += 1
            after = outputs(layer, later, RoutingContext(ids, context.sample_B, context.step, context.seed))
            changed = changed or (after[:t] - before[:t]).abs().max().item() > 1e-4
    sees = config.future == "always" or (config.future == "training" and training)
    assert changed == sees


@pytest.mark.parametrize("name", ALL)
def test_only_declared_ones_depend_on_the_micro_batch(name: str, make_layer: Callable[..., MoELayer]) -> None:
    """One sequence at a time, and the sequences in another order."""
    config = ALL[name]
    layer = make_layer(D, config)
    x, order = draw(S, B, D), [2, 0, 3, 1]
    whole = outputs(layer, x, a_context())
    single = [outputs(layer, x[:, b : b + 1], a_context([10 + b])) for b in range(B)]
    shuffled = outputs(layer, x[:, order], a_context([10 + b for b in order]))
    apart = (torch.cat(single, dim=1) - whole).abs().max().item()
    if config.layout_exact:
        assert apart < 1e-5
        torch.testing.assert_close(shuffled, whole[:, order], rtol=0, atol=1e-5)
    else:
        assert apart > 1e-3


def test_router_scores_get_gradients_and_fixed_ones_have_none() -> None:
    for name, config in CONFIGS.items():
        router = made(config)
        assert bool(list(router.parameters())) == config.scored, name
        routing = routed(router, draw(S, B, D))
        if config.scored:
            probe = draw(*routing.weight_TK.shape, seed=8)
            (routing.weight_TK * probe).sum().backward()
            assert router.weight.grad.abs().max() > 0, name
        else:
            zeros = (routing.logsumexp_T, routing.scored_BE, routing.entropy_T)
            assert all(not value.requires_grad and value.abs().max() == 0 for value in zeros)


def test_jitter_is_for_training_and_differs_by_step() -> None:
    router = made(CONFIGS["jitter"])
    x = draw(S, B, D)
    first, again = routed(router, x), routed(router, x)
    assert torch.equal(first.logsumexp_T, again.logsumexp_T)
    context = a_context()
    later = routed(router, x, context=RoutingContext(context.token_ids_BS, context.sample_B, step=6, seed=1))
    assert (first.logsumexp_T - later.logsumexp_T).abs().min() > 0
    plain = made(CONFIGS["softmax"])
    assert torch.equal(routed(router.eval(), x).logsumexp_T, routed(plain, x).logsumexp_T)


def test_what_a_context_must_hold() -> None:
    x, grid = draw(S * B, D), TokenGrid(B)
    jitter, hashed = made(CONFIGS["jitter"]), made(CONFIGS["hash"])
    for context in (None, RoutingContext(token_ids_BS=torch.zeros(B, S, dtype=torch.int64))):
        with pytest.raises(ValueError, match=r"moe\.jitter \(0\.3\) needs to know the samples"):
            jitter(x, grid, context)
    jitter.eval()(x, grid)
    with pytest.raises(ValueError, match=r"needs the tokens' ids: call the layer with context=RoutingContext"):
        hashed(x, grid)
    with pytest.raises(ValueError, match=r"has shape \(4, 11\); expected are the whole sequences, \(4, 12\)"):
        hashed(x, grid, RoutingContext(torch.zeros(B, S - 1, dtype=torch.int64)))


@pytest.mark.parametrize(("experts", "active"), [(6, 2), (8, 1), (3, 3)])
def test_hashes_are_balanced_over_ids_and_differ_by_layer(experts: int, active: int) -> None:
    config = MoEConfig(experts=experts, active=active, expert_width=8, router="hash")
    index_TK = HashRouter(config, 0).experts_of(torch.arange(20 * experts))
    assert all(len(set(row)) == active for row in index_TK.tolist())
    for run in index_TK.split(experts):
        assert torch.equal(run.flatten().bincount(minlength=experts), torch.full((experts,), active))
    other = HashRouter(config, 1).experts_of(torch.arange(20 * experts))
    assert active == experts or not torch.equal(other, index_TK)


@pytest.mark.parametrize("skew", [0.0, 1.0])
def test_forced_loads_follow_the_skew(skew: float) -> None:
    config = MoEConfig(experts=5, active=1, expert_width=8, router="forced", skew=skew)
    grid = TokenGrid(10)
    visits_E = build_router(D, config, 0)(torch.zeros(20_000, D), grid).visits_BE.sum(dim=0)
    wanted_E = torch.arange(1, 6).float() ** -skew
    torch.testing.assert_close(visits_E / visits_E.sum(), wanted_E / wanted_E.sum(), rtol=0, atol=0.012)


def test_sinkhorn_balances_what_is_skewed() -> None:
    """Experts that all tokens like best; in evaluation tokens get what they like."""
    config = MoEConfig(experts=8, active=2, expert_width=8, router="sinkhorn", **AHEAD)
    router = made(config)
    x = draw(512, 2, D)
    x[..., 0] = 3.0
    with torch.no_grad():
        router.weight[:2, 0] += 1.0

    def worst(routing: Routing) -> float:
        return (routing.visits_BE / routing.visits_BE.mean(dim=1, keepdim=True)).max().item()

    assert worst(routed(router, x, context=RoutingContext())) < 1.3
    assert worst(routed(router.eval(), x, context=RoutingContext())) > 1.6
