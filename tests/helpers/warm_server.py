"""A process that has imported everything and forks what tests start, so that they pay for imports once.

The script that it runs calls `serve`; a test talks to it through `Server`. Commands and answers are lines of JSON:
``{"start": ...}`` -> process id; ``{"poll": pid}`` -> exit code (negative: the signal) or null while it runs.
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self


class Server:
    """The process of a script that serves; as a context it ends with its body."""

    def __init__(self, script: Path):
        self.process = subprocess.Popen(
            [sys.executable, str(script)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._read() == {"ready": True}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.process.kill()
        self.process.wait()

    def ask(self, command: dict[str, Any]) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> Any:
        """The next line that is an answer; libraries print others."""
        assert self.process.stdout is not None
        while line := self.process.stdout.readline():
            with contextlib.suppress(ValueError):
                return json.loads(line)
        raise AssertionError("the server has ended")


def serve(child: Callable[[Any], None]) -> None:
    """Answer commands until the input ends; ``child`` runs in a forked process with what ``start`` came with."""
    from moescale.training.warm import import_all

    import_all()
    _answer({"ready": True})
    for line in sys.stdin:
        command = json.loads(line)
        if "start" in command:
            pid = os.fork()
            if pid == 0:
                child(command["start"])
            _answer(pid)
        else:
            pid, status = os.waitpid(command["poll"], os.WNOHANG)
            _answer(os.waitstatus_to_exitcode(status) if pid else None)


def _answer(content: Any) -> None:
    print(json.dumps(content), flush=True)
