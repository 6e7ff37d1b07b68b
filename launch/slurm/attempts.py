"""``attempts.jsonl`` of a run: every start under Slurm and how it ended; and whether another one is worth it.

The last start owns the run. A start without an end was killed together with its node, or is cut off from it.
"""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from ...base.files import append_line, read_lines

Outcome = Literal["done", "stopped", "cancelled", "memory", "nonfinite", "input", "crash"]
# What may pass by itself. Slurm asked for `stopped`; what was cancelled starts again only if somebody asks Slurm to.
_TRANSIENT = ("stopped", "cancelled", "crash")


@dataclass(frozen=True)
class Policy:
    """How often a run is started again: see `RetryConfig`, which it comes from."""

    restarts: int
    memory: int
    nonfinite: int


@dataclass(frozen=True)
class Start:
    """A start: of which batch, as which job, from which checkpoint (empty: from none)."""

    number: int
    batch: str
    job: str
    host: str
    saved: str
    time: float


@dataclass(frozen=True)
class End:
    """How a start ended, with the latest checkpoint then."""

    outcome: Outcome
    reason: str
    saved: str
    time: float


def saved_so_far(folder: Path) -> str:
    """Name of the run's latest checkpoint, empty if there is none. Names sort by step.

    The folders are looked at by name alone: reading checkpoints takes torch, and a supervisor shall be up at once.
    """
    return max((entry.name for entry in (folder / "checkpoints").glob("step-*")), default="")


class Attempts:
    """The starts of a run."""

    def __init__(self, folder: Path):
        self._path = folder / "attempts.jsonl"
        self.starts: list[tuple[Start, End | None]] = []
        for line in read_lines(self._path):
            kind = line.pop("kind")
            if kind == "start":
                self.starts.append((Start(**line), None))
            elif kind == "end" and self.starts:
                self.starts[-1] = (self.starts[-1][0], End(**line))

    def start(self, batch: str, job: str, host: str, saved: str) -> Start:
        """Note a start, which owns the run from now on."""
        start = Start(len(self.starts) + 1, batch, job, host, saved, time.time())
        append_line(self._path, {"kind": "start", **asdict(start)})
        self.starts.append((start, None))
        return start

    def end(self, outcome: Outcome, reason: str, saved: str) -> None:
        """Note how the last start ended."""
        end = End(outcome, reason, saved, time.time())
        append_line(self._path, {"kind": "end", **asdict(end)})
        self.starts[-1] = (self.starts[-1][0], end)

    def owns(self, start: Start) -> bool:
        """Whether no later start has taken the run over, by what the disk says now."""
        latest = [line for line in read_lines(self._path) if line["kind"] == "start"]
        return bool(latest) and latest[-1]["number"] == start.number and latest[-1]["job"] == start.job

    def objection(self, batch: str, saved: str, policy: Policy) -> str:
        """Why no further start of ``batch`` is worth it, given the latest checkpoint; empty if one is.

        A submission by hand is another batch, so it begins to count anew.
        """
        mine = [(start, end) for start, end in self.starts if start.batch == batch]
        ends = [end for _, end in mine if end is not None]
        last = ends[-1] if ends else None
        said = f"; the last one: {last.reason}" if last and last.reason else ""
        if last is not None and last.outcome not in _TRANSIENT:
            allowed = {"memory": policy.memory, "nonfinite": policy.nonfinite}.get(last.outcome, 0)
            count = sum(end.outcome == last.outcome for end in ends)
            if count > allowed:
                return last.reason if count == 1 else f"{last.reason}; {count} times"
        idle = 0
        for start, _ in reversed(mine):
            if start.saved != saved:
                break
            idle += 1
        if idle > policy.restarts:
            since = f"beyond {saved}" if saved else "at all"
            return f"{idle} starts in a row saved nothing {since}: no use in another{said}"
        return ""
