"""A model's whole state through a checkpoint and back, bit for bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from saving import save

from moescale.checkpoint.shards import BadCheckpoint
from moescale.checkpoint.state import BUFFER, PARTS, LogicalState
from moescale.checkpoint.storage import Checkpoint, folder_of
from moescale.moe import MoEConfig

CARRYING = MoEConfig(experts=4, active=2, expert_width=16, balance="global", bias_rate=0.01)


def state_of(made: Any) -> LogicalState:
    return LogicalState(made.engine, made.entries, made.buffers)


def step(made: Any, first: int) -> None:
    """An optimizer step as training/step.py takes it."""
    made.backward(first)
    made.engine.reduce()
    made.engine.step(0.01)
    for _, mixture in made.stage.mixtures():
        mixture.balance.observe(mixture.take_statistics()[: mixture.config.experts])


def everything(made: Any) -> dict[str, torch.Tensor]:
    """Masters, moments and model parameters by name."""
    names = {id(entry.parameter): name for name, entry in made.entries.items()}
    found = {f"{names[id(s.parameter)]}/master": s.master.clone() for s in made.engine.slices()}
    for owned in made.engine.slices():
        found.update({f"{names[id(owned.parameter)]}/{key}": value.clone() for key, value in owned.moments.items()})
    found.update({name: entry.parameter.detach().clone() for name, entry in made.entries.items()})
    found.update({buffer.piece.name: buffer.values.clone() for buffer in made.buffers})
    return found


def assert_same_state(first: Any, second: Any) -> None:
    one, other = everything(first), everything(second)
    assert one.keys() == other.keys()
    assert len(one) == 4 * len(first.entries) + len(first.buffers)
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize(("zero", "dtype"), [(0, "fp32"), (1, "fp32"), (1, "bf16")])
def test_resuming_is_bit_exact(train: Callable[..., Any], tmp_path: Path, zero: int, dtype: str) -> None:
    """Two steps, save, load into a fresh model, one more step in both: not a bit differs."""
    original = train(zero, dtype)
    step(original, 0)
    step(original, 2)
    save(tmp_path, 2, state_of(original).held(), {})
    resumed = train(zero, dtype)
    state_of(resumed).load(Checkpoint(folder_of(tmp_path, 2)))
    resumed.engine.steps_taken = original.engine.steps_taken
    assert_same_state(original, resumed)
    for made in (original, resumed):
        step(made, 4)
    assert_same_state(original, resumed)


class CountsInGroups(torch.optim.Optimizer):
    """Adam whose steps are counted once for each group, as apex's FusedAdam does; that one needs a GPU."""

    def __init__(self, groups: list[dict[str, Any]]):
        super().__init__([{**group, "decay": None} for group in groups], {"lr": 0.01, "bias_correction": True})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(parameter) for _ in range(2))
                state["exp_avg"].lerp_(parameter.grad, 0.1)
                state["exp_avg_sq"].lerp_(parameter.grad**2, 0.05)
                first = state["exp_avg"] / (1 - 0.9 ** group["step"])
                second = state["exp_avg_sq"] / (1 - 0.95 ** group["step"])
                parameter.sub_(group["lr"] * first / (second.sqrt() + 1e-8))


@pytest.mark.parametrize("zero", [0, 1])
def test_an_optimizer_that_counts_in_its_groups_goes_on_counting(
    train: Callable[..., Any], tmp_path: Path, zero: int
) -> None:
    original, resumed = train(zero, "fp32", CountsInGroups), train(zero, "fp32", CountsInGroups)
    for first in (0, 2, 4):
        step(original, first)
    assert original.engine.steps_taken == 3
    save(tmp_path, 3, state_of(original).held(), {})
    state_of(resumed).load(Checkpoint(folder_of(tmp_path, 3)))
    resumed.engine.steps_taken = 3
    assert_same_state(original, resumed)
    for made in (original, resumed):
        step(made, 6)
    assert_same_state(original, resumed)


def test_where_there_are_no_moments_they_are_zero(train: Callable[..., Any], tmp_path: Path) -> None:
    """Before the first step none are stored, nor in a converted checkpoint; nothing of an older load may stay."""
    made, other = train(), train()
    assert {box.part for box in state_of(made).boxes()} == {"master"}
    save(tmp_path, 1, state_of(made).held(), {})
    step(other, 0)
    state_of(other).load(Checkpoint(folder_of(tmp_path, 1)))
    other.engine.steps_taken = 0
    assert all(not value.any() for owned in other.engine.slices() for value in owned.moments.values())
    for trained in (made, other):
        step(trained, 2)
    assert_same_state(made, other)


def test_boxes_cover_every_logical_tensor_once(train: Callable[..., Any]) -> None:
    made = train()
    step(made, 0)
    found = [(box.part, box.piece.name) for box in state_of(made).boxes()]
    names = {piece.name for entry in made.entries.values() for piece in entry.pieces}
    assert len(found) == len(set(found)) == len(PARTS) * len(names)
    assert {part for part, _ in found} == set(PARTS)


def test_zero_stages_store_the_same(train: Callable[..., Any]) -> None:
    stored = []
    for zero in (0, 1):
        made = train(zero)
        step(made, 0)
        boxes = state_of(made).boxes()
        stored.append({(box.part, box.piece.name): box.values.clone() for box in boxes})
    assert stored[0].keys() == stored[1].keys()
    for key, value in stored[0].items():
        torch.testing.assert_close(stored[1][key], value, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_balancing_carries_is_stored(train: Callable[..., Any], tmp_path: Path, dtype: str) -> None:
    """Biases and loads of every layer, by logical name, bit for bit; a step without them would go elsewhere."""
    original = train(dtype=dtype, moe=CARRYING)
    names = [buffer.piece.name for buffer in original.buffers]
    assert sorted(names) == [f"layers.{layer}.moe.{kind}" for layer in (0, 1) for kind in ("bias", "load")]
    assert {buffer.values.dtype for buffer in original.buffers} == {torch.float32}
    step(original, 0)
    step(original, 2)
    for buffer in original.buffers:
        assert buffer.values.abs().max() > 0
    boxes = [box for box in state_of(original).boxes() if box.part == BUFFER]
    assert [box.piece.name for box in boxes] == names
    save(tmp_path, 2, state_of(original).held(), {})
    resumed = train(dtype=dtype, moe=CARRYING)
    state_of(resumed).load(Checkpoint(folder_of(tmp_path, 2)))
    resumed.engine.steps_taken = original.engine.steps_taken
    assert_same_state(original, resumed)
    for made in (original, resumed):
        step(made, 4)
    assert_same_state(original, resumed)
    for buffer in resumed.buffers:  # they do matter: without them the next step is another
        buffer.values.zero_()
    for made in (original, resumed):
        step(made, 6)
    one, other = everything(original), everything(resumed)
    assert not torch.equal(one["0.decoder.layers.0.mlp.router.weight"], other["0.decoder.layers.0.mlp.router.weight"])


def test_a_checkpoint_without_buffers_serves_only_who_needs_none(train: Callable[..., Any], tmp_path: Path) -> None:
    plain_config = CARRYING.model_copy(update={"balance": "sequence", "bias_rate": 0.0})
    plain = train(moe=plain_config)
    assert not plain.buffers
    save(tmp_path, 1, state_of(plain).held(), {})
    checkpoint = Checkpoint(folder_of(tmp_path, 1))
    state_of(train(moe=plain_config)).load(checkpoint)
    with pytest.raises(BadCheckpoint, match=r"holds no buffer/layers\.0\.moe\.bias"):
        state_of(train(moe=CARRYING)).load(checkpoint)


def test_an_unknown_buffer_is_refused(train: Callable[..., Any], one_rank: Any) -> None:
    """As with parameters, nothing that a step depends on is left out silently."""
    from moescale.models.config import ModelConfig
    from moescale.models.names import NameMap

    made = train(moe=CARRYING)
    made.gpt.decoder.layers[1].mlp.register_buffer("memory", torch.zeros(3))
    with pytest.raises(KeyError, match=r"no logical name for the buffer 0\.decoder\.layers\.1\.mlp\.memory"):
        NameMap(ModelConfig(layers=2, width=32, heads=2), CARRYING, one_rank).buffers(made.stage)
