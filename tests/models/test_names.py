"""The map from local parameters to logical tensors leaves nothing out and takes nothing twice."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from moescale.models.config import ModelConfig
from moescale.models.logical import buffer_shapes, logical_shapes
from moescale.moe import MoEConfig


def expected_shapes(model: ModelConfig, moe: MoEConfig | None) -> dict[str, tuple[int, ...]]:
    """The list of logical tensors in the design, written out."""
    width, query, key = model.width, model.heads * model.head_dim, model.kv_heads * model.head_dim
    shapes: dict[str, tuple[int, ...]] = {"embedding": (128, width), "final_norm": (width,)}
    if not model.tied:
        shapes["head"] = (128, width)

    def swiglu(prefix: str, hidden: int) -> None:
        shapes.update(
            {f"{prefix}gate": (hidden, width), f"{prefix}up": (hidden, width), f"{prefix}down": (width, hidden)}
        )

    for i in range(model.layers):
        layer = f"layers.{i}."
        shapes.update({f"{layer}attention_norm": (width,), f"{layer}ffn_norm": (width,)})
        matrices = {"q": (query, width), "k": (key, width), "v": (key, width), "o": (width, query)}
        if model.mla is not None:
            matrices = latent_shapes(model)
        shapes.update({f"{layer}attention.{name}": shape for name, shape in matrices.items()})
        if model.qkv_bias:
            shapes.update({f"{layer}attention.{n}_bias": (rows,) for n, rows in (("q", query), ("k", key), ("v", key))})
        if model.qk_norm != "none":
            for name, heads in (("q_norm", model.heads), ("k_norm", model.kv_heads)):
                whole = (heads, model.head_dim) if model.qk_norm == "full" else (model.head_dim,)
                shapes[f"{layer}attention.{name}"] = whole
        if moe is None or not moe.is_mixture(i):
            swiglu(f"{layer}ffn.", model.ffn)
            continue
        hidden = moe.width_of_expert(width)
        if moe.scored:
            shapes[f"{layer}moe.router"] = (moe.experts, width)
        for expert in range(moe.experts):
            swiglu(f"{layer}moe.experts.{expert}.", hidden)
        if moe.shared:
            swiglu(f"{layer}moe.shared.", moe.shared * hidden)
    return shapes


def latent_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    mla, width = model.mla, model.width
    assert mla is not None
    query = model.heads * (mla.nope_dim + mla.rope_dim)
    shapes: dict[str, tuple[int, ...]] = {
        "kv_down": (mla.kv_rank + mla.rope_dim, width),
        "kv_norm": (mla.kv_rank,),
        "kv_up": (model.heads * (mla.nope_dim + mla.value_dim), mla.kv_rank),
        "o": (width, model.heads * mla.value_dim),
    }
    if mla.q_rank is None:
        return {**shapes, "q": (query, width)}
    return {**shapes, "q_down": (mla.q_rank, width), "q_norm": (mla.q_rank,), "q_up": (query, mla.q_rank)}


def test_logical_tensors(built: Any) -> None:
    pieces = [piece for entry in built.entries.values() for piece in entry.pieces]
    assert {piece.name: piece.shape for piece in pieces} == expected_shapes(built.model, built.moe)
    assert len(pieces) == len({piece.name for piece in pieces}), "on one rank every logical tensor is one piece"
    for piece in pieces:
        assert (piece.start, piece.extent) == ((0,) * len(piece.shape), piece.shape)


def test_the_configuration_alone_tells_them(built: Any) -> None:
    assert logical_shapes(built.model, built.moe, 100) == expected_shapes(built.model, built.moe)


@pytest.mark.parametrize("carrying", [{}, {"bias_rate": 0.1}, {"balance": "global"}, {"bias_rate": 0.1, "every": 2}])
def test_the_configuration_tells_buffers(build: Callable[..., Any], one_rank: Any, carrying: dict[str, Any]) -> None:
    from moescale.models.names import NameMap

    model, moe = ModelConfig(layers=4, width=16, heads=2), MoEConfig(experts=4, active=2, granularity=8, **carrying)
    buffers = NameMap(model, moe, one_rank).buffers(build(model, moe).stage)
    assert {buffer.piece.name: buffer.piece.shape for buffer in buffers} == buffer_shapes(model, moe)
    assert buffer_shapes(model, None) == {}


def test_every_parameter_has_an_entry(built: Any) -> None:
    assert set(built.entries) == {name for name, _ in built.stage.named_parameters()}
    for name, parameter in built.stage.named_parameters():
        assert built.entries[name].parameter is parameter


def test_pieces_tile_each_parameter(built: Any) -> None:
    """Each element of a local parameter belongs to exactly one piece."""
    for name, entry in built.entries.items():
        visits = torch.zeros(entry.parameter.shape)
        for piece in entry.pieces:
            piece.view(visits).add_(1)
        assert torch.equal(visits, torch.ones_like(visits)), name


def test_reading_and_writing_are_inverse(built: Any) -> None:
    for entry in built.entries.values():
        source = torch.randn(entry.parameter.shape, generator=torch.Generator().manual_seed(3))
        target = torch.full_like(source, float("nan"))
        for piece in entry.pieces:
            box = piece.read(source)
            assert tuple(box.shape) == piece.extent
            piece.write(target, box)
        assert torch.equal(target, source)


def test_a_box_of_a_whole_tensor() -> None:
    from moescale.models.names import Piece

    piece = Piece("x", (4, 6), (2, 1), (2, 3), lambda t: t)
    whole = torch.arange(24).view(4, 6)
    assert torch.equal(piece.of(whole), whole[2:4, 1:4])


def test_roles(built: Any) -> None:
    """On one rank nothing is sharded or copied; gains do not decay, experts are experts."""
    for name, entry in built.entries.items():
        role = entry.role
        assert not any((role.tensor_sharded, role.tensor_summed, role.tied_copy))
        assert role.expert == (".experts." in name)
        assert role.decay == ("norm" not in name and not name.endswith(".bias"))


def test_an_unknown_parameter_is_refused(build: Callable[..., Any], one_rank: Any) -> None:
    from moescale.models.names import NameMap

    model = ModelConfig(layers=1, width=16, heads=2)
    stage = build(model, None).stage
    gpt = stage[0]
    gpt.surprise = nn.Parameter(torch.zeros(1))
    with pytest.raises(KeyError, match="no logical name for the parameter surprise"):
        NameMap(model, None, one_rank).entries(stage)
    del gpt.surprise
    gpt.decoder.layers[0].surprise = nn.Parameter(torch.zeros(1))
    with pytest.raises(KeyError, match=r"layers\.0\.surprise"):
        NameMap(model, None, one_rank).entries(stage)
