"""TensorBoard beside the record: one event a line with all its scalars."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .curves import curves

BOARD_EVERY = 0.2  # seconds between points of steps: curves for the eye; the record has every step


class Board:
    """The event file of one attempt, which goes on from the step ``done``."""

    def __init__(self, folder: Path, done: int):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = Event, Summary
        self._written = 0.0
        self._writer = EventFileWriter(str(folder))
        # Readers then drop what earlier attempts wrote of the steps that come again: torch's purge_step.
        again = SessionLog(status=SessionLog.START)
        self._writer.add_event(Event(step=done + 1, wall_time=time.time(), session_log=again))

    def add(self, line: Mapping[str, Any]) -> None:
        """Draw a step or eval line of the record."""
        if line["kind"] == "step" and line["noise"] is None:
            if time.monotonic() - self._written < BOARD_EVERY:
                return
            self._written = time.monotonic()
        values = [self._summary.Value(tag=tag, simple_value=value) for tag, value in curves(line).items()]
        summary = self._summary(value=values)
        self._writer.add_event(self._event(step=line["step"], wall_time=time.time(), summary=summary))

    def close(self) -> None:
        self._writer.close()
