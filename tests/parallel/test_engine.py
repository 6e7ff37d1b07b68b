"""DeepSpeed behind five calls gives what a plain optimizer gives, on one rank."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

Train = Callable[..., Any]


def gradients(made: Any) -> dict[int, Tensor]:
    return {id(parameter): gradient.clone() for parameter, _, gradient in made.engine.reduced_gradients()}


@pytest.mark.parametrize("zero", [0, 1])
def test_steps_are_those_of_plain_adamw(train: Train, zero: int) -> None:
    made = train(zero)
    plain = {p: torch.nn.Parameter(p.detach().clone()) for p in made.engine.parameters}
    by_decay = {d: [plain[p] for p, role in made.roles.items() if role.decay == d] for d in (True, False)}
    other = torch.optim.AdamW(
        [{"params": members, "weight_decay": 0.1 * decay} for decay, members in by_decay.items()], betas=(0.9, 0.95)
    )
    for step, lr in enumerate((0.01, 0.02, 0.005)):
        made.backward(first=2 * step)
        for parameter, copy in plain.items():
            copy.grad = parameter.grad.clone()
        made.engine.reduce()
        made.engine.scale(0.5)
        for copy in plain.values():
            copy.grad.mul_(0.5)
        made.engine.step(lr)
        for group in other.param_groups:
            group["lr"] = lr
        other.step()
        assert all(p.grad is None or p.grad.abs().max() == 0 for p in made.engine.parameters)
    for parameter, copy in plain.items():
        torch.testing.assert_close(parameter, copy, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("zero", [0, 1])
def test_squares_and_reduced_gradients(train: Train, zero: int) -> None:
    made = train(zero)
    made.backward(first=0)
    raw = {p: p.grad.clone() for p in made.engine.parameters}
    made.engine.reduce()
    found = gradients(made)
    for parameter, gradient in raw.items():
        torch.testing.assert_close(found[id(parameter)], gradient.flatten())
    squares = made.engine.squares()
    for expert, value in ((False, squares.dense), (True, squares.expert)):
        expected = sum(g.double().square().sum().item() for p, g in raw.items() if made.roles[p].expert == expert)
        assert math.isclose(value, expected, rel_tol=1e-5)
    assert squares.total == squares.dense + squares.expert
    made.engine.scale(0.25)
    assert math.isclose(made.engine.squares().total, squares.total / 16, rel_tol=1e-5)
    made.engine.step(0.0)


def test_every_parameter_is_updated_by_someone(train: Train) -> None:
    made = train()
    made.backward(first=0)
    before = {p: p.detach().clone() for p in made.engine.parameters}
    made.engine.reduce()
    made.engine.step(0.01)
    for name, entry in made.entries.items():
        assert not torch.equal(entry.parameter, before[entry.parameter]), f"{name} was not updated"


@pytest.mark.parametrize("zero", [0, 1])
def test_slices_are_views_of_masters_and_moments(train: Train, zero: int) -> None:
    made = train(zero)
    made.backward(first=0)
    made.engine.reduce()
    made.engine.step(0.01)
    held: dict[int, int] = {}
    for owned in made.engine.slices():
        length = owned.master.numel()
        held[id(owned.parameter)] = held.get(id(owned.parameter), 0) + length
        part = owned.parameter.detach().view(-1)[owned.start : owned.start + length]
        assert torch.equal(owned.master, part)
        assert set(owned.moments) == {"exp_avg", "exp_avg_sq"}
        owned.master.fill_(0.25)
        owned.moments["exp_avg"].fill_(0.5)
    assert held == {id(p): p.numel() for p in made.engine.parameters}
    made.engine.publish_masters()
    assert all(torch.equal(p, torch.full_like(p, 0.25)) for p in made.engine.parameters)
    assert all((s.moments["exp_avg"] == 0.5).all() for s in made.engine.slices())


@pytest.mark.parametrize("zero", [0, 1])
def test_moments_can_be_prepared_before_the_first_step(train: Train, zero: int) -> None:
    """A step after preparing, with the step count set to 0, is the first step as it would have been."""
    found = []
    for prepare in (False, True):
        made = train(zero)
        assert made.engine.steps_taken == 0
        if prepare:
            made.engine.prepare_moments()
            made.engine.steps_taken = 0
            assert all(s.moments["exp_avg"].abs().max() == 0 for s in made.engine.slices())
        made.backward(first=0)
        made.engine.reduce()
        made.engine.step(0.01)
        assert made.engine.steps_taken == 1
        found.append([p.detach().clone() for p in made.engine.parameters])
    for first, second in zip(*found, strict=True):
        assert torch.equal(first, second)


def test_accumulated_gradients_are_sums(train: Train) -> None:
    """Two micro-batches at half weight are one batch of both; nothing is left over from the step before."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    found = []
    for parts in (1, 2):
        made = train()
        MoEAuxLossAutoScaler.set_loss_scale(torch.tensor([1 / parts]))  # as Megatron's schedule does
        for first in (0, 4):
            for part in range(parts):
                made.backward(first + part * (4 // parts), 4 // parts, weight=1 / parts)
            made.engine.reduce()
            found.append(made.engine.squares().total)
            made.engine.step(0.0)
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1))
    assert math.isclose(found[0], found[2], rel_tol=1e-5)
    assert math.isclose(found[1], found[3], rel_tol=1e-5)


def test_bfloat16_keeps_float32_masters_and_gradients(train: Train) -> None:
    made = train(dtype="bf16")
    parameter = next(p for p, role in made.roles.items() if role.decay)
    assert {p.dtype for p in made.engine.parameters} == {torch.bfloat16}
    made.backward(first=0)
    made.backward(first=2)
    assert parameter.grad.dtype == torch.float32
    made.engine.reduce()
    made.engine.step(1e-6)  # far below bfloat16's resolution: the masters move, the parameters do not
    masters = {id(s.parameter): s.master.clone() for s in made.engine.slices()}
    assert all(s.master.dtype == torch.float32 for s in made.engine.slices())
    rounded = masters[id(parameter)].bfloat16().view_as(parameter)
    torch.testing.assert_close(parameter.detach(), rounded)
    assert not torch.equal(masters[id(parameter)], rounded.float().flatten())
