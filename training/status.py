"""``status.json``: what a run is doing, for launchers and people. Rewritten whole, so it is never half."""

import fcntl
import json
import socket
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from ..base.files import write_atomically

State = Literal["pending", "running", "done", "preempted", "failed"]
SCHEMA = 1
LOCK = ".lock"
# Seconds without a word, after which a run on another host is dead if nobody holds its folder. Some shared file systems
# do not show locks to other hosts, so a free folder alone proves nothing.
SILENCE = 600.0


@dataclass(frozen=True)
class Status:
    """Content of ``status.json``; ``updated`` is seconds since the epoch."""

    schema: int
    state: State
    reason: str | None
    step: int
    steps_total: int
    attempt: int
    host: str
    updated: float


def write_status(
    folder: Path, state: State, *, reason: str | None = None, step: int = 0, steps_total: int = 0, attempt: int = 1
) -> None:
    """Replace the status of the run in ``folder``. Final states are made durable."""
    status = Status(SCHEMA, state, reason, step, steps_total, attempt, socket.gethostname(), time.time())
    write_atomically(folder / "status.json", json.dumps(asdict(status)) + "\n", durable=state != "running")


def read_status(folder: Path) -> Status | None:
    """The status of the run in ``folder``; None when there is none or it cannot be understood."""
    try:
        content = json.loads((folder / "status.json").read_text())
        return Status(**content) if content.get("schema") == SCHEMA else None
    except (OSError, ValueError, TypeError):
        return None


def is_held(folder: Path) -> bool:
    """Whether a process works in the run's folder, or that cannot be told.

    Every process of a run holds its folder's lock for as long as it lives.
    """
    try:
        with (folder / LOCK).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:  # held, or on a file system without locks
        return True
    return False


def current_status(folder: Path) -> Status | None:
    """`read_status`, but a run whose processes are gone is not called running.

    Whoever kills a run's processes, mpirun after the loss of a rank too, leaves them no time to say so.
    """
    status = read_status(folder)
    if status is None or status.state != "running" or is_held(folder):
        return status
    silent = time.time() - status.updated
    if status.host == socket.gethostname():
        return replace(status, state="failed", reason="its process was killed; start it again to go on")
    if silent > SILENCE:
        reason = f"not heard from for {silent:.0f} s, last on {status.host}; start it again to go on"
        return replace(status, state="failed", reason=reason)
    return status
