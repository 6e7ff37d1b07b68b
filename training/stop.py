"""Stop requests: a signal to this rank or a file ``stop`` in the run's folder. Acting on them is the loop's part.

What the file says, if anything, is the reason.
"""

import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

# Reasons, besides what a stop file says.
A_SIGNAL = "signal "
ANOTHER_RANK = "another rank was asked to"


class StopRequest:
    """Collects stop requests while it is entered; ``reason`` names the first one."""

    def __init__(self, folder: Path):
        self._file = str(folder / "stop")
        self._previous: dict[int, Any] = {}
        self.reason: str | None = None

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.reason is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C means now
        self.reason = f"{A_SIGNAL}{signal.Signals(number).name}"

    def asked(self) -> bool:
        """Whether anybody asked this rank to stop."""
        if self.reason is None and os.path.exists(self._file):
            self.reason = _said_in(self._file) or "a file named stop"
        return self.reason is not None

    def forget_file(self) -> None:
        """Remove the stop file once it is obeyed, so that the next start runs."""
        if os.path.exists(self._file):
            os.unlink(self._file)


def _said_in(file: str) -> str:
    try:
        with open(file, encoding="utf-8", errors="replace") as opened:
            return opened.readline().strip()
    except OSError:  # it is going, or not ours to read
        return ""
