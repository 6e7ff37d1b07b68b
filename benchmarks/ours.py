"""Our whole step: what the training loop does for each, through the same classes, record and all."""

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..compat.cuda_standin import install
from ..compat.native import instruction_set
from ..parallel.launchers import Place
from ..parallel.world import leave, start
from ..training.config import RunConfig
from ..training.schedule import learning_rate
from ..training.stop import StopRequest
from .cases import Case

TIMEOUT = 600.0  # seconds; a world of one never waits
WARM_UP = 5  # steps


class WholeStep:
    """A `Stepper`: batch, Megatron schedule, DeepSpeed engine, norms, clipping, AdamW, statistics, a record line."""

    bytes_moved = None

    def __init__(self, case: Mapping[str, Any], data: Mapping[str, Any]):
        self.config = run_config(Case(**case), data)
        install()
        from ..parallel.groups import Groups  # imports Megatron, so only now
        from ..training.recording import Recorder
        from ..training.setup import build
        from ..training.step import take_step

        self._take_step = take_step
        start(Place(rank=0, world=1, local_rank=0, local_world=1), TIMEOUT)
        self._groups = Groups.build(self.config.check_layout(world=1))
        self.setup = build(self.config, self._groups)
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        self._stop = StopRequest(folder)
        self._recorder = Recorder(self.setup, folder, 1, quiet=True)
        self._recorder.begin(None, 0.0)
        self._done = 0

    def warm_up(self) -> str:
        for _ in range(WARM_UP):
            self.step()
        return f"whole step with its record, operations: {instruction_set() or 'reference'}"

    def step(self) -> None:
        lr = learning_rate(self.config, self._done + 1, self.setup.steps)
        began = time.perf_counter()
        result = self._take_step(self.setup, self._done, lr, measure_noise=False, stop_asked=self._stop.asked())
        self._done += 1
        self._recorder.step(self._done, lr, result, time.perf_counter() - began)

    def close(self) -> None:
        self._recorder.close()
        self._groups.destroy()
        leave()
        self._folder.cleanup()


def run_config(case: Case, data: Mapping[str, Any]) -> RunConfig:
    """The run that a case is a step of, long enough for any measurement."""
    moe = case.moe()
    return RunConfig.model_validate(
        {
            "name": case.name,
            "model": case.model().model_dump(),
            "moe": None if moe is None else moe.model_dump(),
            "data": dict(data),
            "optimizer": {"lr": 1e-3},
            "training": {
                "seq": case.seq,
                "batch": case.batch,
                "steps": data["samples"] // case.batch,
                "dtype": case.dtype,
            },
        }
    )
