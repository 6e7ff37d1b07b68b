"""``status.json``: what a run is doing, for launchers and people. Rewritten whole, so it is never half."""

import json
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from ..base.files import write_atomically

State = Literal["pending", "running", "done", "preempted", "failed"]
SCHEMA = 1


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
