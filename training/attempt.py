"""One attempt of a run: build, find the checkpoint to go on from, bring the record in line with it, loop."""

import json
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ..base.errors import EXIT_DONE
from ..base.files import write_atomically
from ..checkpoint.storage import Checkpoint, folder_of, latest_good
from ..parallel.failure import Patience
from ..parallel.groups import Groups
from ..parallel.topology import Topology
from ..parallel.world import limit_waits
from ..scaling.record import RECORD, read_record, rewind
from .config import RunConfig
from .loop import Loop
from .recording import Recorder, environment
from .setup import Setup, build
from .stop import StopRequest
from .trunk import trunk_checkpoint


class Attempt:
    """The life of one start of a run on this rank."""

    def __init__(self, config: RunConfig, folder: Path, topology: Topology, *, quiet: bool):
        self.config, self.folder, self.quiet = config, folder, quiet
        wait = Patience(config.runtime.timeout).wait
        self.groups = Groups.build(topology, config.parallel.exchange, wait, config.parallel.exchange_chunks)
        limit_waits(config.runtime.timeout)

    def run(self, stop: StopRequest) -> int:
        """Go on from the latest good checkpoint; returns the exit code."""
        try:
            setup = build(self.config, self.groups)
            step, complaints = self._restore(setup)
            attempt, seconds = self._align_record(step)
            recorder = Recorder(setup, self.folder, attempt, quiet=self.quiet)
            try:
                return self._go(setup, recorder, stop, step, seconds, complaints)
            finally:
                recorder.close()
        finally:
            self.groups.destroy()

    def _go(
        self, setup: Setup, recorder: Recorder, stop: StopRequest, step: int, seconds: float, complaints: list[str]
    ) -> int:
        if self.groups.rank == 0:
            write_atomically(self.folder / "environment.json", json.dumps(environment(), indent=1))
        recorder.begin(step or None, seconds)
        for complaint in complaints:
            recorder.event("damaged checkpoint", step, complaint)
        if step:
            recorder.event("resumed", step, f"attempt {recorder.attempt}")
        if step >= setup.steps:
            recorder.end("done", step, "")
            return EXIT_DONE
        return Loop(setup, recorder, stop).run(step)

    def _restore(self, setup: Setup) -> tuple[int, list[str]]:
        """Load what there is to go on from; returns (steps done, what was wrong with later checkpoints)."""
        checkpoint, complaints = self._choose()
        if checkpoint is None:
            return 0, complaints
        setup.state.load(checkpoint)
        setup.engine.steps_taken = checkpoint.extra["optimizer_steps"]
        return checkpoint.step, complaints

    def _choose(self) -> tuple[Checkpoint | None, list[str]]:
        """Rank 0 chooses the checkpoint, so that all ranks go on from the same step."""
        choice: list[Any] = [None, []]
        if self.groups.rank == 0:
            checkpoint, complaints = latest_good(self.folder / "checkpoints")
            choice = [None if checkpoint is None else checkpoint.step, complaints]
        if self.groups.topology.world > 1:
            dist.broadcast_object_list(choice)
        step, complaints = choice
        if isinstance(step, int):
            return Checkpoint(folder_of(self.folder / "checkpoints", step)), complaints
        parent = self.config.schedule.parent
        if parent is None:
            return None, complaints
        return trunk_checkpoint(self.config, self.folder, parent), complaints

    def _align_record(self, step: int) -> tuple[int, float]:
        """Cut the record back to ``step``; returns (number of this attempt, wall seconds of the steps that stay)."""
        if self.groups.rank != 0 or not (self.folder / RECORD).exists():
            return 1, 0.0
        attempt = 1 + max((h["attempt"] for h in read_record(self.folder).headers), default=0)
        rewind(self.folder, step, attempt)
        kept = read_record(self.folder)
        return attempt, sum(line["seconds"] for line in kept.steps)
