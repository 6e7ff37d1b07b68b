"""Saying how a run failed: on stderr of every rank, and in the status, where launchers look for it."""

import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

from ..parallel.failure import Failure
from ..scaling.record import RECORD, read_record
from .status import read_status, write_status


class LastWords:
    """What this rank says of a failure during the attempt that begins now."""

    def __init__(self, folder: Path, rank: int):
        self._folder, self._rank = folder, rank
        self._began = time.time()

    def say(self, failure: Failure) -> None:
        """Another rank is at fault: on stderr and in the status."""
        print(f"failed (rank {self._rank} on {socket.gethostname()}): {failure.text}", file=sys.stderr, flush=True)
        self.write(failure)

    def write(self, failure: Failure) -> None:
        """Into the status: rank 0 does it, or the others where rank 0 is the one that is gone.

        A disk that failed the run may refuse that too.
        """
        before = read_status(self._folder)
        if self._rank != 0:
            written = before is not None and before.state == "failed" and before.updated >= self._began
            if written or 0 not in failure.ranks:
                return
        steps = read_record(self._folder).steps if (self._folder / RECORD).exists() else []
        with suppress(OSError):
            write_status(
                self._folder,
                "failed",
                reason=failure.text,
                step=steps[-1]["step"] if steps else 0,
                steps_total=before.steps_total if before else 0,
                attempt=before.attempt if before else 1,
            )
