"""One attempt of a run: build, find the checkpoint to go on from, bring the record in line with it, loop."""

import json
from pathlib import Path

import torch.distributed as dist

from ..base.errors import EXIT_DONE
from ..base.files import write_atomically
from ..checkpoint.shards import BadCheckpoint
from ..checkpoint.storage import Checkpoint, Mismatch, folder_of, steps_in
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
            setup, step, complaints = self._restored()
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

    def _restored(self) -> tuple[Setup, int, list[str]]:
        """A set-up with the state to go on from, the steps it has done, and what was wrong with later checkpoints."""
        setup = build(self.config, self.groups)
        complaints: list[str] = []
        for step in self._candidates():
            checkpoint, complaint = self._read(setup, folder_of(self.folder / "checkpoints", step))
            if checkpoint is not None:
                return setup, self._go_on_from(setup, checkpoint), complaints
            complaints.append(complaint)
        parent = self.config.schedule.parent
        if parent is not None:
            checkpoint = trunk_checkpoint(self.config, self.folder, parent)
            setup.state.read(checkpoint)
            return setup, self._go_on_from(setup, checkpoint), complaints
        if complaints:  # what was read of them must not stay
            setup.engine.close()
            setup = build(self.config, self.groups)
        return setup, 0, complaints

    def _candidates(self) -> list[int]:
        """Steps with a checkpoint, latest first; rank 0 looks, so that all ranks agree."""
        steps = [steps_in(self.folder / "checkpoints")[::-1]]
        if self.groups.topology.world > 1:
            dist.broadcast_object_list(steps)
        return steps[0]

    def _read(self, setup: Setup, folder: Path) -> tuple[Checkpoint | None, str]:
        """The checkpoint in ``folder``, read into the state; None and what is wrong when it is damaged for any rank."""
        checkpoint, complaint = None, ""
        try:
            checkpoint = Checkpoint(folder)
            setup.state.read(checkpoint)
        except Mismatch:
            raise
        except BadCheckpoint as error:
            complaint = str(error)
        complaints = [complaint]
        if self.groups.topology.world > 1:
            complaints = [""] * self.groups.topology.world
            dist.all_gather_object(complaints, complaint)
        complaint = next(filter(None, complaints), "")
        return (None if complaint else checkpoint), complaint

    def _go_on_from(self, setup: Setup, checkpoint: Checkpoint) -> int:
        setup.engine.publish_masters()
        setup.engine.steps_taken = checkpoint.extra.get("optimizer_steps", 0)  # a converted one has taken none
        return checkpoint.step

    def _align_record(self, step: int) -> tuple[int, float]:
        """Cut the record back to ``step``; returns (number of this attempt, wall seconds of the steps that stay)."""
        if self.groups.rank != 0 or not (self.folder / RECORD).exists():
            return 1, 0.0
        attempt = 1 + max((h["attempt"] for h in read_record(self.folder).headers), default=0)
        rewind(self.folder, step, attempt)
        kept = read_record(self.folder)
        return attempt, sum(line["seconds"] for line in kept.steps)
