"""Two ranks that exchange rows when they are asked to, and the end of the benchmark that asks.

The ranks are processes of their own, so that each backend is started as its users start it (MPI's by mpirun), and the
ranks of a backend that is not being measured sleep.
"""

import datetime
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..moe import ops
from ..parallel.exchange import Exchange, GatheringExchange, MpiExchange, SharedExchange, TorchExchange
from .exchange import WIDTH, ExchangeCase, mpirun
from .floor import DTYPES

WARM_UP = 3  # steps
TIMEOUT = 60.0  # seconds
IDLE = 600.0  # seconds without being asked for anything, after which the ranks end: nobody is left
_KINDS: dict[str, Callable[[Any], Exchange]] = {
    "shared": lambda group: SharedExchange(group, TIMEOUT),
    "gloo": TorchExchange,
    "mpi": lambda group: MpiExchange(group, TIMEOUT),
}
_NOTES = {
    "shared": "into the peer's memory",
    "gloo": "through the loopback device",
    "mpi": "MPI_Ialltoallv",
    "copy": "each rank copies as many bytes",
}


class Ranks:
    """A `Stepper`: a step is ``repeats`` exchanges between two processes, or copies in each."""

    def __init__(self, case: Mapping[str, Any], kind: str):
        shape = ExchangeCase(**case)
        self.bytes_moved: int | None = shape.bytes * shape.repeats
        self._note = _NOTES[kind]
        self._folder = tempfile.TemporaryDirectory()
        payload = json.dumps({"case": case, "kind": kind, "store": str(Path(self._folder.name) / "store")})
        command = [sys.executable, "-P", "-m", __name__, payload]
        launcher = mpirun()
        if kind == "mpi":
            assert launcher is not None  # the benchmark has looked
            self._second = None
            self._first = _start([launcher, "-np", "2", *command], _mpi_environment())
        else:
            self._second = _start([*command, "1"], {})
            self._first = _start([*command, "0"], {})
        self._read()

    def warm_up(self) -> str:
        for _ in range(WARM_UP):
            self.step()
        return self._note

    def step(self) -> None:
        self._say("go")
        self._read()

    def close(self) -> None:
        self._say("end")  # mpirun does not pass on that its input has ended
        for process in (self._first, self._second):
            if process is not None:
                process.communicate(timeout=TIMEOUT)
        self._folder.cleanup()

    def _say(self, word: str) -> None:
        assert self._first.stdin is not None
        self._first.stdin.write(f"{word}\n")
        self._first.stdin.flush()

    def _read(self) -> None:
        assert self._first.stdout is not None
        if self._first.stdout.readline() != "done\n":
            raise RuntimeError(f"the ranks ended with code {self._first.wait()}")


def _start(command: list[str], environment: Mapping[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}
    )


def _mpi_environment() -> dict[str, str]:
    """Two ranks on a machine that may have one core, also for root."""
    allowed = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"} if os.geteuid() == 0 else {}
    return {**allowed, "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}


def work_of(case: ExchangeCase, kind: str, rank: int) -> Callable[[], object]:
    """What a rank repeats."""
    even = [case.rows // 2] * 2
    draw = torch.Generator().manual_seed(rank)
    tokens = case.rows // case.active if case.gather else case.rows
    rows = torch.randn(tokens, WIDTH, generator=draw).to(DTYPES[case.dtype])
    if kind == "copy":
        source, target = torch.zeros(case.bytes, dtype=torch.uint8), torch.ones(case.bytes, dtype=torch.uint8)
        return lambda: target.copy_(source)
    exchange = _KINDS[kind](dist.group.WORLD)
    if not case.gather:
        return lambda: exchange.rows(rows, even, even)
    visit_R = torch.randperm(case.rows, generator=draw)
    if isinstance(exchange, GatheringExchange):
        return lambda: exchange.gathered(rows, visit_R, case.active, even, even)
    row_TK = visit_R.argsort().view(tokens, case.active)
    return lambda: exchange.rows(ops.permute(rows, visit_R, row_TK), even, even)


def main() -> None:
    """One rank: build, then repeat the work whenever the first rank is asked to."""
    payload, *given = sys.argv[1:]
    rank = int(given[0] if given else os.environ["OMPI_COMM_WORLD_RANK"])
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    wanted = json.loads(payload)
    case = ExchangeCase(**wanted["case"])
    idle = datetime.timedelta(seconds=IDLE)
    dist.init_process_group("gloo", store=dist.FileStore(wanted["store"], 2), rank=rank, world_size=2, timeout=idle)
    work = work_of(case, wanted["kind"], rank)
    with torch.no_grad():
        while True:
            if rank == 0:
                print("done", flush=True)
            again = torch.tensor([rank == 0 and sys.stdin.readline() == "go\n"])
            dist.broadcast(again, 0)  # the second rank sleeps here
            if not again:
                break
            for _ in range(case.repeats):
                work()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
