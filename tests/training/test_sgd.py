"""Plain gradient descent under the engine: what a step does, and resuming from a checkpoint without moments."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from saving import save

from moescale.base.config import validate
from moescale.base.errors import UserError
from moescale.checkpoint.state import LogicalState
from moescale.checkpoint.storage import Checkpoint, folder_of
from moescale.training.config import OptimizerConfig
from moescale.training.optimizer import make_optimizer

LR, DECAY = 0.5, 0.1


def sgd(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return make_optimizer(OptimizerConfig(impl="sgd", lr=LR, weight_decay=DECAY), groups)


def step(made: Any, first: int) -> None:
    made.backward(first)
    made.engine.reduce()
    made.engine.step(LR)


@pytest.mark.parametrize("zero", [0, 1])
def test_a_step_goes_down_the_gradient(train: Callable[..., Any], zero: int) -> None:
    made = train(zero, "fp32", sgd)
    before = {name: entry.parameter.detach().clone() for name, entry in made.entries.items()}
    made.backward(0)
    made.engine.reduce()
    gradient = {id(p): g.clone() for p, _, g in made.engine.reduced_gradients()}
    made.engine.step(LR)
    for name, entry in made.entries.items():
        decay = DECAY * before[name] if entry.role.decay else 0.0
        wanted = before[name] - LR * (gradient[id(entry.parameter)].view_as(before[name]) + decay)
        torch.testing.assert_close(entry.parameter.detach(), wanted, rtol=1e-6, atol=1e-7)
    assert all(not owned.moments for owned in made.engine.slices())


@pytest.mark.parametrize("zero", [0, 1])
def test_resuming_is_bit_exact(train: Callable[..., Any], tmp_path: Path, zero: int) -> None:
    original, resumed = train(zero, "fp32", sgd), train(zero, "fp32", sgd)
    step(original, 0)
    save(tmp_path, 1, LogicalState(original.engine, original.entries, original.buffers).held(), {})
    LogicalState(resumed.engine, resumed.entries, resumed.buffers).load(Checkpoint(folder_of(tmp_path, 1)))
    resumed.engine.steps_taken = original.engine.steps_taken
    for made in (original, resumed):
        step(made, 2)
    for name, entry in original.entries.items():
        assert torch.equal(entry.parameter, resumed.entries[name].parameter), name


def test_settings_of_adam_are_refused() -> None:
    with pytest.raises(UserError, match=r"optimizer\.betas .* means nothing with optimizer\.impl sgd"):
        validate(OptimizerConfig, {"impl": "sgd", "lr": 0.1, "betas": [0.8, 0.9]}, "run")
