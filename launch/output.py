"""What every verb prints: text or a table for people, one JSON document with ``--json``."""

import json
import sys
from typing import Any

from rich.console import Console


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps(value, indent=1, allow_nan=False) + "\n")


def console() -> Console:
    """For tables on stdout; wide where stdout is no terminal, so that files hold whole rows."""
    return Console() if sys.stdout.isatty() else Console(width=160)


def note(text: str) -> None:
    """A line for people, on stderr, so that stdout stays what was asked for."""
    print(text, file=sys.stderr, flush=True)
