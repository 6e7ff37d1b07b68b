"""Every rank of a layout, one after another in one process: real models and engines in worlds without messages.

Enough for what a checkpoint needs of a rank: saving and loading gather nothing.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moescale.checkpoint.manifest import Manifest, merged
from moescale.checkpoint.state import LogicalState
from moescale.checkpoint.storage import Checkpoint, publish
from moescale.checkpoint.writing import ShardWriter
from moescale.compat.cuda_standin import install
from moescale.models.config import ModelConfig
from moescale.models.names import NameMap
from moescale.moe.config import MoEConfig
from moescale.parallel.config import ParallelConfig
from moescale.parallel.engine import Engine
from moescale.parallel.fake_world import fake_world
from moescale.parallel.groups import Groups
from moescale.parallel.topology import Topology


@dataclass(frozen=True)
class Layout:
    """A model on ranks."""

    world: int
    parallel: ParallelConfig
    model: ModelConfig
    moe: MoEConfig | None = None

    @property
    def topology(self) -> Topology:
        return Topology.build(self.parallel, self.world)


def states_of(layout: Layout) -> list[LogicalState]:
    """The state of each rank, with moments; values are whatever memory held."""
    install()
    return [_state(layout, rank) for rank in range(layout.world)]


def _state(layout: Layout, rank: int) -> LogicalState:
    from moescale.models.build import build_stage  # Megatron, which needs the stand-in

    with fake_world(rank, layout.world):
        groups = Groups.build(layout.topology)
        stage = build_stage(layout.model, layout.moe, vocab=100, seq=16, dtype="fp32", groups=groups)
        names = NameMap(layout.model, layout.moe, groups)
        entries = names.entries(stage)
        roles = {entry.parameter: entry.role for entry in entries.values()}
        engine = Engine(stage, roles, groups, _adamw, layout.parallel.zero)
        engine.prepare_moments()
        state = LogicalState(engine, entries, names.buffers(stage))
        groups.destroy()
    return state


def _adamw(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    for group in groups:
        del group["decay"]
    return torch.optim.AdamW(groups)


def save_from(states: list[LogicalState], root: Path, step: int) -> Checkpoint:
    """A checkpoint of all ranks' states."""
    folder = root / "beside"
    folder.mkdir(parents=True)
    written = []
    for rank, state in enumerate(states):
        writer = ShardWriter(folder, f"rank-{rank:05d}")
        for box in state.boxes():
            writer.add(box.part, box.piece.name, box.piece.shape, box.piece.start, box.values)
        written.append(writer.close())
    return Checkpoint(publish(root, Manifest(step, {}, merged(written)), folder))


def whole_tensors(checkpoint: Checkpoint) -> dict[tuple[str, str], Tensor]:
    """Everything a checkpoint holds, by (part, name)."""
    parts = ("master", "exp_avg", "exp_avg_sq", "buffer")
    return {(part, name): checkpoint.whole(part, name) for part in parts for name in checkpoint.tensors(part)}
