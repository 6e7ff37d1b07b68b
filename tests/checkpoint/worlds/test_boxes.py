"""Ranges as boxes: every element on exactly one rank, in no more boxes than it takes, whatever the layout."""

import math

import pytest
import torch
from fake_ranks import Layout, states_of
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from moescale.base.errors import UserError
from moescale.checkpoint.boxes import boxes_of_range, cuts_of
from moescale.models.config import ModelConfig
from moescale.models.names import Piece
from moescale.moe.config import MoEConfig
from moescale.parallel.config import ParallelConfig

extents = st.lists(st.integers(1, 7), min_size=1, max_size=3).map(tuple)


@given(st.data(), extents)
def test_boxes_make_up_a_range(data: st.DataObject, extent: tuple[int, ...]) -> None:
    size = math.prod(extent)
    first = data.draw(st.integers(0, size))
    last = data.draw(st.integers(first, size))
    elements = torch.arange(size).view(extent)
    found, count = [], 0
    for start, shape in boxes_of_range(extent, first, last):
        box = elements[tuple(slice(s, s + n) for s, n in zip(start, shape, strict=True))]
        assert box.shape == shape
        assert box.numel()
        found += box.flatten().tolist()
        count += 1
    assert found == list(range(first, last))
    assert count <= 2 * len(extent) - 1


@st.composite
def pieces(draw: st.DrawFn) -> tuple[tuple[Piece, ...], tuple[int, ...]]:
    """Pieces of a local tensor, fused and strided as in models/names.py, and its shape."""
    width, rank, ranks = draw(st.integers(1, 5)), draw(st.integers(0, 2)), 3
    if draw(st.booleans()):  # groups of heads: queries, key, value in turn
        groups, queries, d = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))

        def heads(name: str, first: int, count: int) -> Piece:
            rows = groups * count * d
            view = lambda t: t.view(groups, queries + 2, d, width).narrow(1, first, count)  # noqa: E731
            return Piece(name, (rows * ranks, width), (rows * rank, 0), (rows, width), view)

        found = (heads("q", 0, queries), heads("k", queries, 1), heads("v", queries + 1, 1))
        return found, (groups * (queries + 2) * d, width)
    experts, rows = draw(st.integers(1, 3)), draw(st.integers(1, 4))

    def expert(index: int, part: int) -> Piece:
        view = lambda t: t[index].narrow(0, part * rows, rows)  # noqa: E731
        return Piece(f"{index}.{part}", (rows, width), (0, 0), (rows, width), view)

    return tuple(expert(e, p) for e in range(experts) for p in (0, 1)), (experts, 2 * rows, width)


@given(st.data(), pieces())
def test_ranges_of_fused_tensors(data: st.DataObject, drawn: tuple[tuple[Piece, ...], tuple[int, ...]]) -> None:
    """Cut at random places, every element of every piece is in one range, at its place; and comes back."""
    found, shape = drawn
    size = math.prod(shape)
    local = torch.arange(size, dtype=torch.float32).view(shape)
    ends = sorted(data.draw(st.lists(st.integers(0, size), max_size=4)))
    whole = {piece.name: torch.full(piece.shape, -1.0) for piece in found}
    back = torch.full((size,), -1.0)
    for first, last in zip([0, *ends], [*ends, size], strict=True):
        cuts = cuts_of(found, shape, first, last)
        for piece in found:
            assert sum(cut.piece.name == piece.name for cut in cuts) <= 3
        for cut in cuts:
            box = cut.piece.of(whole[cut.piece.name])
            assert (box == -1).all()
            box.copy_(cut.read(local.flatten()[first:last]))
            cut.write(back[first:last], box)
    for piece in found:
        assert torch.equal(piece.of(whole[piece.name]), piece.read(local))
    assert torch.equal(back, local.flatten())


MODEL = ModelConfig(layers=4, width=24, heads=4, kv_heads=2, head_dim=6, ffn=40, vocab_multiple=20, qk_norm="full")
MOE = MoEConfig(experts=6, active=2, expert_width=8, shared=1, first_dense=1, balance="global", bias_rate=0.01)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    moe = draw(st.sampled_from([MOE, None]))
    changes = {
        "tied": draw(st.booleans()),
        "qk_norm": draw(st.sampled_from(["none", "head", "full"])),
        "width": draw(st.sampled_from([8, 24, 40])),
    }
    sizes = {
        "tensor": draw(st.sampled_from([1, 2])),
        "pipeline": draw(st.sampled_from([1, 2])),
        "expert": draw(st.sampled_from([1, 2, 3])) if moe else 1,
        "expert_over": draw(st.sampled_from(["dp", "dp_tp"])),
        "zero": draw(st.sampled_from([1, 1, 1, 0])),
    }
    world = sizes["tensor"] * sizes["pipeline"] * draw(st.integers(1, 3))
    model = ModelConfig.model_validate({**MODEL.model_dump(), **changes})
    return Layout(world, ParallelConfig(**sizes), model, moe)


@settings(max_examples=15, deadline=None)
@given(layouts())
def test_every_element_is_on_exactly_one_rank(layout: Layout) -> None:
    try:
        states = states_of(layout)
    except (UserError, ValidationError):
        return  # the sizes do not fit into this world
    times: dict[tuple[str, str], torch.Tensor] = {}
    for state in states:
        for held in state.held():
            assert sum(math.prod(cut.piece.extent) for cut in held.cuts) == held.values.numel()
            for cut in held.cuts:
                key = (held.part, cut.piece.name)
                cut.piece.of(times.setdefault(key, torch.zeros(cut.piece.shape))).add_(1)
    for key, count in times.items():
        assert (count == 1).all(), key
    names = {name for part, name in times if part == "master"}
    assert {name for part, name in times if part == "exp_avg"} == names
    assert "embedding" in names
    assert ("head" in names) == (not layout.model.tied)
    experts = {name for name in names if ".experts." in name}
    assert len(experts) == (0 if layout.moe is None else 3 * 3 * 6)


@pytest.mark.parametrize("data", [2, 3, 4])
def test_ranks_share_out_the_work(data: int) -> None:
    """Replicas store equal shares: no rank writes for all of them."""
    states = states_of(Layout(data, ParallelConfig(), MODEL, None))
    held = [sum(one.values.numel() for one in state.held()) for state in states]
    assert max(held) <= sum(held) / data * 1.02
