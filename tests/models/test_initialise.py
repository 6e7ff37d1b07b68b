"""Initial parameters: functions of seed and logical name, whatever box of a tensor is asked for."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moescale.models.config import ModelConfig
from moescale.models.initialise import BLOCK_ROWS, draw_box, initialise
from moescale.models.names import Piece
from moescale.moe import MoEConfig


def piece(shape: tuple[int, int], start: tuple[int, int] = (0, 0), extent: tuple[int, int] | None = None) -> Piece:
    return Piece("layers.0.attention.q", shape, start, extent or shape, lambda t: t)


@settings(deadline=None)
@given(st.data())
def test_a_box_is_the_slice_of_the_whole(data: st.DataObject) -> None:
    shape = (data.draw(st.integers(1, 3 * BLOCK_ROWS)), data.draw(st.integers(1, 9)))
    start = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
    extent = tuple(data.draw(st.integers(1, n - first)) for n, first in zip(shape, start, strict=True))
    box = piece(shape, start, extent)  # type: ignore[arg-type]
    assert torch.equal(draw_box(7, box, 0.5), box.of(draw_box(7, piece(shape), 0.5)))


def test_draws_differ_by_seed_name_and_block() -> None:
    shape = (2 * BLOCK_ROWS, 4)
    first = draw_box(0, piece(shape), 1.0)
    assert not torch.equal(first, draw_box(1, piece(shape), 1.0))
    assert not torch.equal(first, draw_box(0, Piece("layers.1.attention.q", shape, (0, 0), shape, lambda t: t), 1.0))
    assert not torch.equal(first[:BLOCK_ROWS], first[BLOCK_ROWS:])


def test_draws_are_standard_normal() -> None:
    drawn = draw_box(3, piece((600, 400)), 2.0)
    assert drawn.dtype == torch.float32
    assert abs(drawn.mean().item()) < 0.02
    assert drawn.std().item() == pytest.approx(2.0, rel=0.01)
    assert (drawn.abs() > 4).double().mean().item() == pytest.approx(0.0455, rel=0.05)


def test_the_values_themselves_stay() -> None:
    """A changed draw would silently change every run; these were drawn when the format was fixed."""
    drawn = draw_box(0, Piece("embedding", (256, 4), (127, 0), (2, 4), lambda t: t), 1.0)
    expected = [
        [-0.83089894, 1.47908044, -0.07509251, -1.25631380],
        [1.75337934, 0.67279536, -0.08495747, -0.90430778],
    ]
    torch.testing.assert_close(drawn, torch.tensor(expected), rtol=1e-6, atol=0)


def initialised(built: Any, model: ModelConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    initialise(built.entries.values(), model, seed)
    return {p.name: p.read(e.parameter.detach()).clone() for e in built.entries.values() for p in e.pieces}


def test_standard_deviations(build: Any) -> None:
    model = ModelConfig(layers=2, width=128, heads=4, kv_heads=2, qk_norm="head", tied=False)
    moe = MoEConfig(experts=4, active=2, granularity=2, shared=1, first_dense=1)
    found = initialised(build(model, moe), model)
    for name, tensor in found.items():
        if "norm" in name:
            assert torch.equal(tensor, torch.ones_like(tensor)), name
            continue
        std = 1 / math.sqrt(tensor.shape[1])
        if name.rsplit(".", 1)[-1] in ("o", "down"):
            std /= math.sqrt(2 * model.layers)
        assert tensor.std().item() == pytest.approx(std, rel=0.06), name
    fixed = model.model_copy(update={"init_std": 0.02})
    assert initialised(build(fixed, moe), fixed)["head"].std().item() == pytest.approx(0.02, rel=0.03)


def test_all_tensors_differ(build: Any) -> None:
    """No two matrices start alike, experts least of all; the same seed gives the same, another seed another."""
    model, moe = ModelConfig(layers=2, width=32, heads=4, tied=False), MoEConfig(experts=4, active=2, expert_width=32)
    made = build(model, moe)
    found = {name: tensor for name, tensor in initialised(made, model).items() if "norm" not in name}
    corners = {tuple(tensor.flatten()[:3].tolist()) for tensor in found.values()}
    assert len(corners) == len(found)
    again, other = initialised(made, model), initialised(made, model, seed=1)
    for name, tensor in found.items():
        assert torch.equal(tensor, again[name])
        assert not torch.equal(tensor, other[name])
