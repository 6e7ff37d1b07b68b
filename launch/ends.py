"""The ends of what a run writes: its record's last lines and its log's."""

import json
from pathlib import Path
from typing import Any

from ..scaling.record import RECORD

_TAIL = 1 << 16  # bytes; several step lines, router statistics included
_LOG_LINES = 5


def latest_line(folder: Path, kind: str) -> dict[str, Any] | None:
    """The last whole line of a kind in a run's record, read from the end of the file."""
    try:
        with (folder / RECORD).open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(size - _TAIL, 0))
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return None
    for raw in reversed(lines[:-1]):  # what follows the last newline is being written
        if raw.startswith(f'{{"kind":"{kind}"'.encode()):
            line = json.loads(raw)
            assert isinstance(line, dict)
            return line
    return None


def log_tail(folder: Path) -> tuple[str, ...]:
    """The last lines of a run's latest log."""
    logs = [path for path in (folder / "logs").glob("*.log") if path.stem.isdigit()]
    if not logs:
        return ()
    latest = max(logs, key=lambda path: int(path.stem))
    with latest.open("rb") as file:
        file.seek(max(file.seek(0, 2) - 4096, 0))
        lines = file.read().decode(errors="replace").splitlines()
    return tuple([line.rstrip() for line in lines if line.strip()][-_LOG_LINES:])
