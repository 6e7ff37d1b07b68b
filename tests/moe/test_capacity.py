"""Capacity against a loop that serves one visit after the other."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moescale.moe import MoEConfig, MoELayer
from moescale.moe.capacity import capacity_of, rows_limit, within_capacity
from moescale.moe.routing import Routing, TokenGrid

DROPS = ("probability", "position")
COUPLINGS = ("sequence", "micro_batch")


def config_of(experts: int, active: int, factor: float, **more: Any) -> MoEConfig:
    return MoEConfig(experts=experts, active=active, expert_width=8, capacity=factor, **more)


def routing_of(index_TK: Tensor, weight_TK: Tensor, experts: int) -> Routing:
    nothing_T = torch.zeros(len(index_TK))
    return Routing(index_TK, weight_TK, nothing_T, torch.zeros(1, experts), torch.ones(1, experts), nothing_T)


def served(index_BSK: Tensor, weight_BSK: Tensor, mask_BS: Tensor, config: MoEConfig) -> Tensor:
    """Visits that are served, one after the other in their order of precedence."""
    sequences, length, slots = index_BSK.shape
    room: dict[tuple[int, int], int] = {}
    for b in range(sequences):
        of_scope = mask_BS[b] if config.capacity_scope == "sequence" else mask_BS
        for expert in range(config.experts):
            scope = b if config.capacity_scope == "sequence" else 0
            room[scope, expert] = capacity_of(config, int(of_scope.sum()))
    visits = [(s, b, k) for s in range(length) for b in range(sequences) for k in range(slots)]
    if config.drop == "probability":
        visits.sort(key=lambda visit: -weight_BSK[visit[1], visit[0], visit[2]].item())
    fits_BSK = torch.zeros_like(index_BSK, dtype=torch.bool)
    for s, b, k in visits:
        expert = int(index_BSK[b, s, k])
        if not mask_BS[b, s] or not 0 <= expert < config.experts:
            continue
        cell = (b if config.capacity_scope == "sequence" else 0, expert)
        fits_BSK[b, s, k] = room[cell] > 0
        room[cell] -= 1
    return fits_BSK


@st.composite
def cases(draw: Any) -> tuple[Tensor, Tensor, Tensor, MoEConfig, bool]:
    """(experts, weights, mask, configuration, batch_first); few weights, so that there are ties."""
    sequences, length, experts = draw(st.integers(1, 3)), draw(st.integers(1, 7)), draw(st.integers(1, 5))
    active = draw(st.integers(1, experts))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    order_BSE = torch.rand(sequences, length, experts, generator=generator).argsort(dim=-1)
    # Different experts for each token; or one, and then crowded ones; and now and then none.
    index_BSK = order_BSE[..., :active] if draw(st.booleans()) else order_BSE[..., :1] // 2
    index_BSK = index_BSK.masked_fill(torch.rand(index_BSK.shape, generator=generator) < 0.1, -1)
    weight_BSK = torch.randint(1, draw(st.sampled_from([2, 4, 1000])), index_BSK.shape, generator=generator) / 8
    mask_BS = torch.rand(sequences, length, generator=generator) > draw(st.sampled_from([0.0, 0.4]))
    config = config_of(
        experts,
        active,
        draw(st.sampled_from([0.1, 0.5, 1.0, 1.1, 1.25, 10.0])),
        drop=draw(st.sampled_from(DROPS)),
        capacity_scope=draw(st.sampled_from(COUPLINGS)),
    )
    return index_BSK, weight_BSK, mask_BS, config, draw(st.booleans())


@settings(deadline=None, max_examples=300)
@given(cases())
def test_the_right_visits_are_served(case: tuple[Tensor, Tensor, Tensor, MoEConfig, bool]) -> None:
    index_BSK, weight_BSK, mask_BS, config, batch_first = case
    order = (lambda t: t) if batch_first else (lambda t: t.transpose(0, 1))
    grid = TokenGrid(len(index_BSK), batch_first, order(mask_BS).flatten())
    slots = index_BSK.shape[-1]
    weight_TK = order(weight_BSK).reshape(-1, slots).clone().requires_grad_()
    routing = routing_of(order(index_BSK).reshape(-1, slots), weight_TK, config.experts)
    kept = within_capacity(routing, grid, config)
    fits_TK = order(served(index_BSK, weight_BSK, mask_BS, config)).reshape(-1, slots)
    assert torch.equal(kept.index_TK, routing.index_TK.masked_fill(~fits_TK, -1))
    assert torch.equal(kept.weight_TK, weight_TK.masked_fill(~fits_TK, 0)), "kept weights stay what they were"
    (gradient,) = torch.autograd.grad(kept.weight_TK.sum(), weight_TK)
    assert torch.equal(gradient, fits_TK.float())
    assert kept.visits_BE is routing.visits_BE
    scope_T = grid.sequence_of_token(len(fits_TK), fits_TK.device)
    if config.capacity_scope == "micro_batch":
        scope_T = torch.zeros_like(scope_T)
    for scope in scope_T.unique():
        inside_T = scope_T == scope
        real = int(grid.mask_T[inside_T].sum())  # type: ignore[index]
        visits_E = torch.bincount(kept.index_TK[inside_T].flatten() + 1, minlength=config.experts + 1)[1:]
        assert visits_E.max() <= capacity_of(config, real)


def test_no_capacity_changes_nothing() -> None:
    routing = routing_of(torch.zeros(6, 1, dtype=torch.int64), torch.ones(6, 1), 2)
    assert within_capacity(routing, TokenGrid(2), MoEConfig(experts=2, active=1, expert_width=8)) is routing


def test_experts_that_do_not_exist_take_nobodys_place() -> None:
    index_TK = torch.tensor([[-1], [7], [2], [0], [0], [0]])
    config = config_of(2, 1, 1.0, drop="position")
    kept = within_capacity(routing_of(index_TK, torch.ones(6, 1), 2), TokenGrid(1), config)
    assert kept.index_TK.flatten().tolist() == [-1, -1, -1, 0, 0, 0]


@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -1.0])
def test_weights_that_make_no_sense_take_no_other_experts_place(value: float) -> None:
    """Any router output is legal: a step that diverges must end in a non-finite loss, not in another error."""
    index_TK = torch.tensor([[0], [1], [0], [1], [0], [1]])
    weight_TK = torch.tensor([[value], [0.5], [0.5], [value], [0.5], [0.5]])
    kept = within_capacity(routing_of(index_TK, weight_TK, 2), TokenGrid(1), config_of(2, 1, 0.5))
    assert torch.bincount(kept.index_TK.flatten() + 1)[1:].tolist() == [2, 2]


def test_capacity_is_rounded_up_and_only_that() -> None:
    """In floating point 1.1 * 2 * 40 / 8 is 11.000000000000002."""
    assert capacity_of(config_of(8, 2, 1.1), 40) == 11
    assert capacity_of(config_of(8, 2, 1.1), 41) == 12
    assert capacity_of(config_of(8, 2, 1.0), torch.tensor([0, 1, 4, 5])).tolist() == [0, 1, 1, 2]
    assert capacity_of(config_of(3, 1, 1 / 3), 9) == 1


def test_one_sequence_does_not_take_anothers_place() -> None:
    """Sequence scope: what is kept is what each sequence would keep alone."""
    draw = torch.Generator().manual_seed(0)
    index_SBK, weight_SBK = torch.randint(0, 4, (12, 3, 1), generator=draw), torch.rand(12, 3, 1, generator=draw)
    for drop in DROPS:
        config = config_of(4, 1, 1.0, drop=drop)
        together = within_capacity(
            routing_of(index_SBK.flatten(0, 1), weight_SBK.flatten(0, 1), 4), TokenGrid(3), config
        )
        for b in range(3):
            alone = within_capacity(routing_of(index_SBK[:, b], weight_SBK[:, b], 4), TokenGrid(1), config)
            assert torch.equal(together.index_TK.view(12, 3, 1)[:, b], alone.index_TK)
        assert (together.index_TK == -1).any()


def outputs(layer: MoELayer, x_SBD: Tensor) -> Tensor:
    with torch.no_grad():
        return layer(x_SBD).hidden


@pytest.mark.parametrize("scope", COUPLINGS)
@pytest.mark.parametrize("drop", DROPS)
def test_dropping_is_causal_by_position_alone(drop: str, scope: str, make_layer: Callable[..., MoELayer]) -> None:
    """By probability later tokens push earlier ones out: the configuration must say so."""
    config = config_of(4, 2, 0.6, drop=drop, capacity_scope=scope)
    layer = make_layer(16, config)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(16, 3, 16, generator=draw)
    later = x.clone()
    later[9:] = torch.randn(7, 3, 16, generator=draw)
    same = torch.equal(outputs(layer, x)[:9], outputs(layer, later)[:9])
    assert same == (drop == "position")
    assert config.causal == same


@pytest.mark.parametrize("drop", DROPS)
def test_the_layer_is_the_dropless_one_without_those_visits(drop: str, make_layer: Callable[..., MoELayer]) -> None:
    config = config_of(4, 2, 0.7, drop=drop)
    layer, free = make_layer(16, config), make_layer(16, MoEConfig(experts=4, active=2, expert_width=8))
    x = torch.randn(10, 2, 16, generator=torch.Generator().manual_seed(0))
    grid = TokenGrid(2)
    routing = free.router(x.flatten(0, 1), grid)
    kept = within_capacity(routing, grid, config)
    assert (kept.index_TK < 0).any()
    expected = torch.zeros(20, 16)
    for t in range(20):
        for k in range(2):
            if kept.index_TK[t, k] >= 0:
                gate_up = layer.experts.w_in[kept.index_TK[t, k]] @ x.flatten(0, 1)[t]
                gate, up = gate_up.chunk(2)
                row = layer.experts.w_out[kept.index_TK[t, k]] @ (torch.nn.functional.silu(gate) * up)
                expected[t] += kept.weight_TK[t, k] * row
    torch.testing.assert_close(layer(x).hidden.flatten(0, 1), expected, rtol=1e-4, atol=1e-5)
    assert layer.take_statistics()[4] == (kept.index_TK < 0).sum()


@settings(deadline=None)
@given(cases())
def test_no_expert_gets_more_rows_than_the_limit(case: tuple[Tensor, Tensor, Tensor, MoEConfig, bool]) -> None:
    index_BSK, weight_BSK, mask_BS, config, _ = case
    config = config.model_copy(update={"padded": True})
    grid = TokenGrid(len(index_BSK), True, mask_BS.flatten())
    slots = index_BSK.shape[-1]
    kept = within_capacity(
        routing_of(index_BSK.reshape(-1, slots), weight_BSK.reshape(-1, slots), config.experts), grid, config
    )
    limit = rows_limit(config, grid, mask_BS.numel())
    assert limit is not None
    visits_E = torch.bincount(kept.index_TK.flatten() + 1, minlength=config.experts + 1)[1:]
    assert visits_E.max() <= limit <= mask_BS.numel()


def test_rows_are_unlimited_without_padding() -> None:
    config = config_of(4, 2, 1.0)
    assert rows_limit(config, TokenGrid(2), 20) is None
    padded = config.model_copy(update={"padded": True})
    assert rows_limit(padded, TokenGrid(2), 20) == 2 * 5
    assert rows_limit(padded, replace(TokenGrid(2), mask_T=torch.zeros(20, dtype=torch.bool)), 20) == 2 * 5
    assert rows_limit(padded.model_copy(update={"capacity_scope": "micro_batch"}), TokenGrid(3), 21) == 11
    assert rows_limit(padded, TokenGrid(0), 0) == 0
