"""What `bench checkpoint` measures: a model's whole state, and what is done to it."""

import gc
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..base.files import sync
from ..checkpoint.saver import HostBuffers, Saver
from ..checkpoint.state import LogicalState
from ..checkpoint.storage import Checkpoint, folder_of, prune
from ..compat.cuda_standin import install
from ..parallel.launchers import Place
from ..parallel.world import leave, start
from .checkpoint import CheckpointCase

WARM_UP = 2  # steps
TIMEOUT = 600.0  # seconds; a world of one never waits


def state_of(case: CheckpointCase) -> LogicalState:
    """A model's parameters and moments, random, under the engine; joins a world of one."""
    install()
    from ..models.build import build_stage  # imports Megatron, so only now
    from ..models.initialise import initialise
    from ..models.names import NameMap
    from ..parallel.engine import Engine
    from ..parallel.groups import Groups
    from ..parallel.topology import Topology
    from ..training.config import OptimizerConfig
    from ..training.optimizer import make_optimizer

    start(Place(rank=0, world=1, local_rank=0, local_world=1), TIMEOUT)
    groups = Groups.build(Topology())
    model, moe = case.shape(), case.moe()
    stage = build_stage(model, moe, vocab=case.vocab, seq=16, dtype="fp32", groups=groups)
    names = NameMap(model, moe, groups)
    entries = names.entries(stage)
    initialise(entries.values(), model, seed=0)
    roles = {entry.parameter: entry.role for entry in entries.values()}
    engine = Engine(stage, roles, groups, lambda found: make_optimizer(OptimizerConfig(lr=1e-3), found), zero=1)
    engine.prepare_moments()
    for owned in engine.slices():
        for values in owned.moments.values():
            values.normal_()
    gc.freeze()  # as a run does (training/setup.py): full collections would walk over all imports again
    return LogicalState(engine, entries, names.buffers(stage))


def bytes_of(state: LogicalState) -> int:
    return sum(one.values.nbytes for one in state.held())


class _OnDisk:
    """A folder on the disk of the current one, removed at the end."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".bench-checkpoint-")
        self.root = Path(self._folder.name)

    def close(self) -> None:
        self._folder.cleanup()


class Save(_OnDisk):
    """A `Stepper`: one checkpoint after another, each complete before the last one goes."""

    def __init__(self, case: Mapping[str, Any]):
        super().__init__()
        self.state = state_of(CheckpointCase(**case))
        self.bytes_moved: int | None = bytes_of(self.state)
        self._saver = Saver(self.root, published=lambda step: prune(self.root, 1, ()))
        self._done = 0

    def warm_up(self) -> str:
        for _ in range(WARM_UP):
            self.step()
        return "written, forced onto the disk, read back, renamed; the one before deleted"

    def step(self) -> None:
        self._done += 1
        self._saver.save(self._done, self.state.held(), {}, background=False)

    def close(self) -> None:
        super().close()
        leave()


class Load(Save):
    """A `Stepper`: reads a checkpoint into the state, from the disk, not from the system's copy of it."""

    def warm_up(self) -> str:
        self._saver.save(1, self.state.held(), {}, background=False)
        self.step()
        return "read from the disk, verified, put in place"

    def step(self) -> None:
        folder = folder_of(self.root, 1)
        for path in folder.glob("*.safetensors"):
            forget(path)
        self.state.read(Checkpoint(folder))


class CopyFile(_OnDisk):
    """A `Stepper`: copies a file of as many bytes on the same disk, by the system's fastest way."""

    def __init__(self, case: Mapping[str, Any]):
        super().__init__()
        wanted = CheckpointCase(**case)
        self.bytes_moved: int | None = bytes_of(state_of(wanted))
        self._cold = wanted.what == "load"
        (self.root / "source").write_bytes(os.urandom(1 << 20) * -(-self.bytes_moved // (1 << 20)))
        os.truncate(self.root / "source", self.bytes_moved)
        sync(self.root / "source")

    def warm_up(self) -> str:
        for _ in range(WARM_UP):
            self.step()
        return f"a file of as many bytes copied{' from the disk' if self._cold else ''} and forced onto the disk"

    def step(self) -> None:
        source, target, before = (self.root / name for name in ("source", "target", "before"))
        if self._cold:
            forget(source)
        shutil.copyfile(source, target)
        sync(target)
        target.rename(before)

    def close(self) -> None:
        super().close()
        leave()


class Stall:
    """A `Stepper`: what the main thread does for a save in the background, save starting the thread."""

    def __init__(self, case: Mapping[str, Any]):
        self.state = state_of(CheckpointCase(**case))
        self.bytes_moved: int | None = bytes_of(self.state)
        self._buffers = HostBuffers()

    def warm_up(self) -> str:
        for _ in range(WARM_UP):
            self.step()
        return f"{len(self.state.held())} ranges of parameters and moments"

    def step(self) -> None:
        self._buffers.copy(self.state.held())

    def close(self) -> None:
        leave()


class CopyMemory(Stall):
    """A `Stepper`: as many bytes from one warm buffer to another."""

    def __init__(self, case: Mapping[str, Any]):
        super().__init__(case)
        assert self.bytes_moved is not None
        self._source = torch.ones(self.bytes_moved // 4)
        self._target: Tensor = torch.zeros_like(self._source)

    def warm_up(self) -> str:
        super().warm_up()
        return "one copy of as many bytes"

    def step(self) -> None:
        self._target.copy_(self._source)


def forget(path: Path) -> None:
    """Make the system give up its copy of a file in memory."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
