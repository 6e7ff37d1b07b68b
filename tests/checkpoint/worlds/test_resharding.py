"""From any layout into any other: masters, moments and what balancing carries, bit for bit, as logical tensors."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_ranks import Layout, save_from, states_of, whole_tensors
from torch import Tensor

from moescale.checkpoint.reading import ShardReader
from moescale.checkpoint.state import LogicalState
from moescale.checkpoint.storage import Checkpoint, write_whole
from moescale.models.config import ModelConfig
from moescale.moe.config import MoEConfig
from moescale.parallel.config import ParallelConfig

MODEL = ModelConfig(layers=4, width=24, heads=4, kv_heads=2, head_dim=6, ffn=40, vocab_multiple=20, qk_norm="full")
MOE = MoEConfig(experts=6, active=2, expert_width=8, shared=1, first_dense=1, balance="global", bias_rate=0.01)
UNTIED = ModelConfig.model_validate({**MODEL.model_dump(), "tied": False, "qk_norm": "head", "kv_heads": 4})


def layout(world: int, model: ModelConfig = MODEL, moe: MoEConfig | None = MOE, **sizes: Any) -> Layout:
    return Layout(world, ParallelConfig(**sizes), model, moe)


LAYOUTS = {
    "1": layout(1),
    "dp2": layout(2),
    "tp2": layout(2, tensor=2),
    "pp2": layout(2, pipeline=2),
    "ep2": layout(2, expert=2),
    "ep2-zero0": layout(2, expert=2, zero=0),
    "tp2-ep2": layout(2, tensor=2, expert=2),
    "tp2-over-dp": layout(2, tensor=2, expert_over="dp"),
    "ep3": layout(3, expert=3),
    "dp4": layout(4),
    "tp2-ep2-dp2": layout(4, tensor=2, expert=2),
    "tp2-ep2-over-dp": layout(4, tensor=2, expert=2, expert_over="dp"),
    "pp2-ep2": layout(4, pipeline=2, expert=2),
    "pp2-virtual2-dp2": layout(4, pipeline=2, virtual_stages=2),
    "tp2-pp2": layout(4, tensor=2, pipeline=2),
    "tp2-pp2-ep2-dp2": layout(8, tensor=2, pipeline=2, expert=2),
}


class World:
    """A layout's ranks, and the checkpoint that they write after reading ``reference``."""

    def __init__(self, states: list[LogicalState], root: Path, reference: Checkpoint):
        self.states = states
        for state in states:
            state.read(reference)
        self.stored = save_from(states, root, reference.step)


def random_checkpoint(root: Path, shapes: dict[tuple[str, str], tuple[int, ...]]) -> Checkpoint:
    draw = torch.Generator().manual_seed(0)
    tensors = ((part, name, torch.randn(shape, generator=draw)) for (part, name), shape in shapes.items())
    return Checkpoint(write_whole(root, 7, tensors, {}))


def shapes_of(states: list[LogicalState]) -> dict[tuple[str, str], tuple[int, ...]]:
    return {(box.part, box.piece.name): box.piece.shape for state in states for box in state.boxes()}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return random_checkpoint(tmp_path_factory.mktemp("reference"), shapes_of(states_of(LAYOUTS["1"])))


@pytest.fixture(scope="module")
def world(reference: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], World]:
    made: dict[str, World] = {}

    def get(name: str) -> World:
        if name not in made:
            made[name] = World(states_of(LAYOUTS[name]), tmp_path_factory.mktemp(name), reference)
        return made[name]

    return get


def assert_holds(states: list[LogicalState], wanted: dict[tuple[str, str], Tensor]) -> None:
    """Everything that any rank holds, stored or not, is its part of the logical tensors."""
    for state in states:
        for owned in state.engine.slices():
            cuts = state._cuts(owned.parameter, owned.start, owned.master.numel())
            for part, values in {"master": owned.master, **owned.moments}.items():
                for cut in cuts:
                    assert torch.equal(cut.read(values), cut.piece.of(wanted[part, cut.piece.name])), cut.piece.name
        for buffer in state.buffers:
            assert torch.equal(buffer.values, wanted["buffer", buffer.piece.name])


CORE = ("1", "tp2-ep2", "ep2-zero0", "pp2-ep2", "dp4")


def pairs() -> list[Any]:
    return [
        pytest.param(source, target, marks=() if {source, target} <= set(CORE) else pytest.mark.slow)
        for source in LAYOUTS
        for target in LAYOUTS
    ]


@pytest.mark.parametrize(("source", "target"), pairs())
def test_every_pair_of_layouts(
    source: str, target: str, world: Callable[[str], World], reference: Checkpoint, tmp_path: Path
) -> None:
    wanted = whole_tensors(reference)
    states = world(target).states
    for state in states:
        for owned in state.engine.slices():  # whatever was there before
            for values in (owned.master, *owned.moments.values()):
                values.fill_(float("nan"))
        for buffer in state.buffers:
            buffer.values.fill_(float("nan"))
        state.read(world(source).stored)
    assert_holds(states, wanted)
    found = whole_tensors(save_from(states, tmp_path, 8))
    assert found.keys() == wanted.keys()
    for key, values in wanted.items():
        assert torch.equal(found[key], values), key


@pytest.mark.parametrize("moe", [MOE, None], ids=["moe", "dense"])
@pytest.mark.parametrize("sizes", [{"tensor": 4}, {"pipeline": 4}, {"tensor": 2, "pipeline": 2}], ids=str)
def test_untied_and_dense_models(sizes: dict[str, int], moe: MoEConfig | None, tmp_path: Path) -> None:
    alone = states_of(layout(1, UNTIED, moe))
    stored = random_checkpoint(tmp_path, shapes_of(alone))
    spread = states_of(layout(4, UNTIED, moe, **sizes))
    for state in spread:
        state.read(stored)
    again = save_from(spread, tmp_path / "spread", 8)
    for state in alone:
        state.read(again)
    assert_holds(alone, whole_tensors(stored))


@pytest.mark.parametrize("name", ["dp4", "pp2-ep2"])
def test_a_rank_reads_only_what_it_needs(
    name: str, world: Callable[[str], World], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a checkpoint of its own layout: what it updates, its buffers, and the headers of the files."""
    read: list[int] = []
    original = ShardReader._read

    def counting(self: ShardReader, shard: str, offset: int, size: int) -> Any:
        read.append(size)
        return original(self, shard, offset, size)

    monkeypatch.setattr(ShardReader, "_read", counting)
    for state in world(name).states:
        read.clear()
        state.read(Checkpoint(world(name).stored.folder))
        updated = sum(4 * (owned.master.numel() * (1 + len(owned.moments))) for owned in state.engine.slices())
        assert sum(read) == updated + sum(4 * buffer.values.numel() for buffer in state.buffers)


def test_moments_of_experts_move_with_their_weights(world: Callable[[str], World], reference: Checkpoint) -> None:
    """DeepSpeed#8147: weights of experts were cut for the new ranks, their Adam moments were those of other experts.

    Every expert's weight and both moments are marked with its number, then spread in four other ways.
    """
    for name in ("ep2", "ep3", "tp2-ep2-dp2", "pp2-ep2"):
        states = world(name).states
        for state in states:
            state.read(reference)
            for owned in state.engine.slices():
                for cut in state._cuts(owned.parameter, owned.start, owned.master.numel()):
                    if ".experts." in cut.piece.name:
                        number = float(cut.piece.name.split(".")[4])
                        for offset, values in enumerate((owned.master, *owned.moments.values())):
                            cut.write(values, torch.full(cut.piece.extent, 10 * number + offset))
        stored = save_from(states, Path(world(name).stored.folder.parent) / "marked", 9)
        for other in ("1", "ep2", "dp4"):
            for state in world(other).states:
                state.read(stored)
                for owned in state.engine.slices():
                    assert set(owned.moments) == {"exp_avg", "exp_avg_sq"}
                    for cut in state._cuts(owned.parameter, owned.start, owned.master.numel()):
                        if ".experts." in cut.piece.name:
                            number = 10 * float(cut.piece.name.split(".")[4])
                            assert (cut.read(owned.master) == number).all()
                            assert (cut.read(owned.moments["exp_avg"]) == number + 1).all()
                            assert (cut.read(owned.moments["exp_avg_sq"]) == number + 2).all()
