"""What every verb prints: text or a table for people, one JSON document with ``--json``."""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
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


@contextlib.contextmanager
def stdout_for_results() -> Iterator[None]:
    """Send what libraries print to stderr while the body works: stdout is for the verb's own result."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
