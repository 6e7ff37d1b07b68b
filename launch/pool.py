"""Runs of a study side by side: one warm parent forks a child for each run, so that imports are paid once.

The parent has imported torch, DeepSpeed and Megatron but started no thread and no process group, which is what
makes forking safe; each child is then a process like any that ``moescale train`` starts. Where there are GPUs each
child sees one of them, the one that fewest others use.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import NoReturn, Protocol

from ..base.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, UserError
from ..training.config import RunConfig
from ..training.run import train
from ..training.status import read_status
from .environment import cuda_devices
from .failure import explain_failure, kernel_kills, starved_since

_TICK = 0.5  # seconds between looks at the clock and at stop requests
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_libc = ctypes.CDLL(None, use_errno=True)
_fork = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Job:
    """A run to be done in ``folder``; ``cost`` orders jobs, dearest first. It waits for the job named ``after``."""

    config: RunConfig
    folder: Path
    cost: float
    after: str = ""

    @property
    def name(self) -> str:
        return self.config.name


@dataclass(frozen=True)
class Outcome:
    """How a child ended. ``code`` is its exit code, ``reason`` says why where it is not 0."""

    job: Job
    code: int
    reason: str
    seconds: float


@dataclass(frozen=True)
class Child:
    """A run that is going on; ``device`` is the GPU that it has, None where there is none."""

    job: Job
    process: BaseProcess
    log: Path
    first_step: int
    device: str | None = None
    started: float = field(default_factory=time.monotonic)
    began: float = field(default_factory=time.time)  # on the clock of status.json
    kernel_kills: int | None = field(default_factory=kernel_kills)


class Watcher(Protocol):
    """Who shows what is going on."""

    def began(self, child: Child) -> None: ...

    def ended(self, outcome: Outcome) -> None: ...

    def tick(self, running: Sequence[Child]) -> None: ...


class _StopRequests:
    """Counts SIGINT and SIGTERM: the first asks the runs to save and stop, the second kills them."""

    def __init__(self) -> None:
        self.count = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._count) for number in _STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _count(self, number: int, frame: FrameType | None) -> None:
        self.count += 1


def run_all(jobs: Sequence[Job], workers: int, watcher: Watcher) -> list[Outcome]:
    """Do ``jobs``, at most ``workers`` at a time, whatever becomes of single ones.

    After a stop request no job is started, and those that run are asked to save and stop: jobs that never started
    have no outcome.
    """
    waiting = sorted(jobs, key=lambda job: job.cost)
    running: list[Child] = []
    outcomes: list[Outcome] = []
    devices = cuda_devices()
    requests, heeded = _StopRequests(), 0
    try:
        with requests.listening():
            while running or (waiting and not requests.count):
                while len(running) < workers and not requests.count and (ready := _ready(waiting, running)):
                    waiting.remove(ready[-1])
                    running.append(_start(ready[-1], _freest(devices, running)))
                    watcher.began(running[-1])
                if requests.count > heeded:
                    heeded = requests.count
                    for child in running:
                        child.process.terminate() if heeded == 1 else child.process.kill()
                wait([child.process.sentinel for child in running], timeout=_TICK)
                for child in [child for child in running if not child.process.is_alive()]:
                    running.remove(child)
                    outcomes.append(_outcome(child, stopping=requests.count > 0))
                    watcher.ended(outcomes[-1])
                watcher.tick(running)
    finally:
        for child in running:  # only an error of our own leaves any
            child.process.kill()
    return outcomes


def _ready(waiting: Sequence[Job], running: Sequence[Child]) -> list[Job]:
    """Jobs that wait for no other one that is still to end."""
    unfinished = {job.name for job in waiting} | {child.job.name for child in running}
    return [job for job in waiting if job.after not in unfinished]


def _freest(devices: Sequence[str], running: Sequence[Child]) -> str | None:
    """The device that fewest of the running use."""
    used = Counter(child.device for child in running)
    return min(devices, key=lambda device: used[device], default=None)


def _start(job: Job, device: str | None) -> Child:
    status = read_status(job.folder)
    attempt = (status.attempt if status else 0) + 1
    log = job.folder / "logs" / f"{attempt}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    process = _fork.Process(target=_run_child, args=(job, log, device, os.getpid()), name=job.name)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)  # until the child no longer has our handlers
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return Child(job, process, log, status.step if status else 0, device)


def _run_child(job: Job, log: Path, device: str | None, parent: int) -> NoReturn:
    """The whole life of a child; it leaves by ``os._exit``, so that nothing of the parent's is run a second time."""
    code = EXIT_FAILED
    try:
        _die_with(parent)
        _be_killed_first()
        if device is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = device
        os.setpgrp()  # Ctrl-C on a terminal reaches the parent alone, which then asks each child once
        for number in _STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)
        with log.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        code = train(job.config, job.folder, quiet=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = EXIT_BAD_INPUT
    except BaseException:  # the process ends here, so nothing may pass
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent dies, however that dies."""
    if _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # it died before the call
        os._exit(EXIT_FAILED)


def _be_killed_first() -> None:
    """When memory runs out the kernel shall end this run, not the parent that can say so and go on with others."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("500")


def _outcome(child: Child, stopping: bool) -> Outcome:
    child.process.join()
    code = child.process.exitcode
    assert code is not None
    if stopping and code in (-signal.SIGTERM, -signal.SIGKILL):  # we did that: it goes on from its last checkpoint
        code = EXIT_STOPPED
    done = code in (EXIT_DONE, EXIT_STOPPED)
    starved = starved_since(child.kernel_kills)
    reason = "" if done else explain_failure(child.job.folder, child.log, child.began, code, starved=starved)
    return Outcome(child.job, code, reason, time.monotonic() - child.started)
