"""A model's whole state through a checkpoint and back, bit for bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moescale.checkpoint.state import PARTS, LogicalState
from moescale.checkpoint.storage import Checkpoint, folder_of, save


def step(made: Any, first: int) -> None:
    made.backward(first)
    made.engine.reduce()
    made.engine.step(0.01)


def everything(made: Any) -> dict[str, torch.Tensor]:
    """Masters, moments and model parameters by name."""
    names = {id(entry.parameter): name for name, entry in made.entries.items()}
    found = {f"{names[id(s.parameter)]}/master": s.master.clone() for s in made.engine.slices()}
    for owned in made.engine.slices():
        found.update({f"{names[id(owned.parameter)]}/{key}": value.clone() for key, value in owned.moments.items()})
    found.update({name: entry.parameter.detach().clone() for name, entry in made.entries.items()})
    return found


def assert_same_state(first: Any, second: Any) -> None:
    one, other = everything(first), everything(second)
    assert one.keys() == other.keys()
    assert len(one) == 4 * len(first.entries)
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize(("zero", "dtype"), [(0, "fp32"), (1, "fp32"), (1, "bf16")])
def test_resuming_is_bit_exact(train: Callable[..., Any], tmp_path: Path, zero: int, dtype: str) -> None:
    """Two steps, save, load into a fresh model, one more step in both: not a bit differs."""
    original = train(zero, dtype)
    step(original, 0)
    step(original, 2)
    save(tmp_path, 2, LogicalState(original.engine, original.entries).boxes(), {})
    resumed = train(zero, dtype)
    LogicalState(resumed.engine, resumed.entries).load(Checkpoint(folder_of(tmp_path, 2)))
    resumed.engine.steps_taken = original.engine.steps_taken
    assert_same_state(original, resumed)
    for made in (original, resumed):
        step(made, 4)
    assert_same_state(original, resumed)


def test_a_state_before_the_first_step_has_zero_moments(train: Callable[..., Any]) -> None:
    """They are stored as zeros, so that every checkpoint holds every part."""
    made = train()
    moments = [box for box in LogicalState(made.engine, made.entries).boxes() if box.part != "master"]
    assert len(moments) == 2 * sum(len(entry.pieces) for entry in made.entries.values())
    assert all(box.values.abs().max() == 0 for box in moments)


def test_boxes_cover_every_logical_tensor_once(train: Callable[..., Any]) -> None:
    made = train()
    step(made, 0)
    found = [(box.part, box.piece.name) for box in LogicalState(made.engine, made.entries).boxes()]
    names = {piece.name for entry in made.entries.values() for piece in entry.pieces}
    assert len(found) == len(set(found)) == len(PARTS) * len(names)
    assert {part for part, _ in found} == set(PARTS)


def test_zero_stages_store_the_same(train: Callable[..., Any]) -> None:
    stored = []
    for zero in (0, 1):
        made = train(zero)
        step(made, 0)
        boxes = LogicalState(made.engine, made.entries).boxes()
        stored.append({(box.part, box.piece.name): box.values.clone() for box in boxes})
    assert stored[0].keys() == stored[1].keys()
    for key, value in stored[0].items():
        torch.testing.assert_close(stored[1][key], value, rtol=1e-6, atol=1e-9)
