"""What a batch script becomes: the parent of one start of a run, and the one who decides what comes after it.

    python -m moescale.launch.slurm.supervise RUN_FOLDER --batch TAG --restarts K --memory K --nonfinite K -- COMMAND...

Slurm warns the batch shell alone, so this process takes the shell's place by ``exec``. It puts a ``stop`` file into the
run's folder, which the ranks of all nodes see: torchrun, sent a signal itself, would kill them after half a minute. It
imports neither torch nor anything that does.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType

from ...base.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, UserError
from ...training.status import State, is_held, read_status, write_status
from ...training.stop import A_SIGNAL, ANOTHER_RANK
from ..failure import kernel_kills, starved_since
from . import commands
from .attempts import Attempts, Policy, Start, saved_so_far
from .judgement import Judgement, judge

_TICK = 0.5  # seconds between looks at the command
_HAND_OVER = 120.0  # seconds for an earlier start, cut off from Slurm but alive, to save and let go of the run
_MARK = "Slurm"  # begins what we write into a stop file; a person's is left alone


class Supervisor:
    """One start of the run in ``folder``."""

    def __init__(self, folder: Path, batch: str, policy: Policy, job: str):
        self.folder, self.batch, self.policy, self.job = folder, batch, policy, job
        self.attempts = Attempts(folder)
        self._stop = folder / "stop"
        self._asked = ""
        self._warned = False  # by the signal that Slurm sends before it ends a job

    def run(self, command: list[str]) -> int:
        """Start ``command`` unless that is no use, see it through, and act on how it ended; returns the exit code."""
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, self._on_signal)
        status = read_status(self.folder)
        if status is not None and status.state == "done":
            return EXIT_DONE
        if objection := self.attempts.objection(self.batch, saved_so_far(self.folder), self.policy):
            return self._give_up(objection)
        start = self.attempts.start(self.batch, self.job, socket.gethostname(), saved_so_far(self.folder))
        if self._take_over():
            judgement = self._see_through(command, start)
        else:
            judgement = Judgement("crash", f"an earlier start still holds the folder after {_HAND_OVER:g} s")
        if not self.attempts.owns(start):
            _say("another start has taken this run over")
            return EXIT_STOPPED
        return self._conclude(judgement)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """Ask the ranks to stop. Slurm may send several signals; the first says why."""
        self._warned = self._warned or number == signal.SIGUSR1
        if not self._asked:
            name = signal.Signals(number).name
            why = "time limit or preemption" if number == signal.SIGUSR1 else "cancelled, preempted or out of time"
            self._asked = f"{_MARK} sent {name} to job {self.job} ({why})"
            with suppress(OSError):
                self._stop.write_text(self._asked + "\n")

    def _take_over(self) -> bool:
        """Have an earlier start save and end: a node may be lost to Slurm and yet compute. Whether the run is free."""
        deadline = time.monotonic() + _HAND_OVER
        while held := is_held(self.folder):
            if time.monotonic() > deadline or self._asked:
                break
            if not self._stop.exists():  # one that was just starting may have removed it
                self._stop.write_text(f"{_MARK} started this run again as job {self.job}\n")
            time.sleep(_TICK)
        self._withdraw()
        return not held

    def _withdraw(self) -> None:
        """Remove a stop request that one of us wrote, so that it stops no later start."""
        with suppress(OSError):
            if self._stop.read_text().startswith(_MARK) and not self._asked:
                self._stop.unlink()

    def _see_through(self, command: list[str], start: Start) -> Judgement:
        status = read_status(self.folder)
        log = self.folder / "logs" / f"{(status.attempt if status else 0) + 1}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        _say(f"start {start.number} of {self.folder.name} as job {self.job}; its output: {log}")
        began, kills = time.time(), kernel_kills()
        with log.open("ab") as file:
            offset = file.tell()
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        while process.poll() is None:
            # Not by wait() alone: a signal's handler runs between two looks.
            with suppress(subprocess.TimeoutExpired):
                process.wait(_TICK)
        return judge(self.folder, log, offset, began, process.returncode, starved_since(kills))

    def _conclude(self, judgement: Judgement) -> int:
        """Note how this start ended, and have Slurm start the run again where that helps."""
        asked, self._asked = self._asked, ""
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # what comes now is our own requeue
        self._withdraw()
        fate: commands.Fate = "ends" if judgement.outcome == "done" else commands.fate_of(self.job)
        outcome, reason = self._in_view_of(judgement, asked, fate)
        saved = saved_so_far(self.folder)
        self.attempts.end(outcome, reason, saved)
        if outcome == "done":
            _say("done")
            return EXIT_DONE
        if outcome == "cancelled":
            return self._give_up(f"cancelled: {reason}")
        if objection := self.attempts.objection(self.batch, saved, self.policy):
            return self._give_up(objection)
        self._write("preempted", reason)
        _say(f"{reason}; starting it again")
        return self._start_again(reason, fate)

    def _in_view_of(self, judgement: Judgement, asked: str, fate: commands.Fate) -> Judgement:
        """``judgement``, knowing what Slurm asked for and what it means to do with the job."""
        outcome, reason = judgement
        if outcome == "crash" and asked:  # killed before it could save, or while it imported torch
            return Judgement("stopped", f"{asked}, and killed before it could save")
        if outcome == "crash" and fate == "restarts":
            return Judgement("stopped", f"Slurm took the node for lost and starts the run again; {reason}")
        by_hand = not asked and not reason.startswith((_MARK, A_SIGNAL, ANOTHER_RANK))
        if outcome == "stopped" and (by_hand or (fate == "ends" and not self._warned)):
            return Judgement("cancelled", reason)
        return judgement

    def _start_again(self, reason: str, fate: commands.Fate) -> int:
        try:
            if fate != "restarts":
                commands.requeue(self.job)
        except UserError as error:
            return self._give_up(f"{reason}; Slurm does not start it again: {error}")
        return EXIT_STOPPED

    def _give_up(self, reason: str) -> int:
        self._write("failed", reason)
        _say(f"not started again: {reason}")
        return EXIT_FAILED

    def _write(self, state: State, reason: str) -> None:
        status = read_status(self.folder)
        step, total, attempt = (status.step, status.steps_total, status.attempt) if status else (0, 0, 0)
        with suppress(OSError):
            write_status(self.folder, state, reason=reason, step=step, steps_total=total, attempt=attempt)


def _say(text: str) -> None:
    """Into Slurm's own log."""
    print(f"{time.strftime('%F %T')} {text}", flush=True)


def main() -> int:
    """Entry point of batch scripts."""
    parser = argparse.ArgumentParser(prog="python -m moescale.launch.slurm.supervise")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--batch", required=True)
    for name in ("restarts", "memory", "nonfinite"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("command", nargs="+")
    given = parser.parse_args()
    try:
        # Not SLURM_JOB_ID: for one element that is the whole array's id.
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    except KeyError as name:
        print(f"error: {name} is not set: this runs inside an array job of Slurm", file=sys.stderr)
        return EXIT_BAD_INPUT
    commands.rename(job, given.folder.name)
    policy = Policy(given.restarts, given.memory, given.nonfinite)
    return Supervisor(given.folder, given.batch, policy, job).run(given.command)


if __name__ == "__main__":
    sys.exit(main())
