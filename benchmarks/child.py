"""A process for each implementation: it builds once and takes steps when it is asked to.

Threads and allocator are fixed before a process starts, so implementations that are to be compared in turns need
processes that stay. Requests are lines of JSON on the child's standard input, replies lines on its standard output.
"""

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol, Self

_ALLOCATOR = ("MALLOC_", "GLIBC_TUNABLES")  # how glibc is told
LAST_WORDS = 3000  # characters of a failed child's messages that are shown


class Stepper(Protocol):
    """An implementation. The factory that makes it takes the payload's keys as keyword arguments.

    Attributes:
        bytes_moved: what a step has to read and write, where that is what limits it; None elsewhere.
    """

    bytes_moved: int | None

    def warm_up(self) -> str:
        """First steps, and choices that are made by time; returns a note for the row."""
        ...

    def step(self) -> None: ...

    def close(self) -> None: ...


class Child:
    """The parent's end of a measured process. It begins to build at once; use it in a ``with``.

    Args:
        factory: ``module:callable`` inside this package, which makes the `Stepper`.
        payload: JSON for it.
        threads: of torch.
        environment: variables that replace any allocator settings of this process.

    Raises:
        RuntimeError: from every method, when the process ended; the text holds the end of its messages.
    """

    def __init__(self, factory: str, payload: Mapping[str, Any], threads: int, environment: Mapping[str, str]):
        self._name = factory
        self._messages = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (closed in __exit__)
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(_ALLOCATOR)}
        # -P: the working directory may hold folders named like packages
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, factory, json.dumps(payload), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._messages,
            text=True,
            env={**inherited, **environment, "OMP_NUM_THREADS": str(threads)},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if kind is not None:
            self._process.kill()
        try:
            self._process.communicate(timeout=30)  # the end of its input is its sign to close
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
        self._messages.close()

    def wait_until_built(self) -> int | None:
        """Returns the implementation's ``bytes_moved``."""
        moved: int | None = self._reply()["bytes_moved"]
        return moved

    def warm_up(self) -> str:
        """Take the first steps; returns the implementation's note."""
        return str(self._ask({"do": "warm_up"})["note"])

    def peak_bytes(self) -> int:
        """Take a step; returns what its tensors occupy at once, see `peak_bytes_of`."""
        return int(self._ask({"do": "peak"})["bytes"])

    def measure(self, seconds: float) -> float:
        """Step for at least ``seconds``; returns the mean time of a step."""
        return float(self._ask({"do": "measure", "seconds": seconds})["step"])

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._fail()
        return self._reply()

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._fail()
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _fail(self) -> None:
        code = self._process.wait()
        self._messages.seek(0)
        raise RuntimeError(f"{self._name} ended with code {code}:\n{self._messages.read()[-LAST_WORDS:]}")


def _measure(stepper: Stepper, seconds: float) -> float:
    from .device import finish

    stepper.step()  # another process had the caches
    finish()
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds or count == 0:
        stepper.step()
        count += 1
    finish()
    return (time.perf_counter() - began) / count


def peak_bytes_of(step: Callable[[], None]) -> int:
    """The most by which allocated tensors grow in a step.

    Counted from torch's own record of allocations, so it does not depend on the allocator. The record lacks the end
    of what lived before; growth from the lowest point is the same with and without it.
    """
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    assert record.profiler is not None
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    total = lowest = growth = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        lowest = min(lowest, total)
        growth = max(growth, total - lowest)
    return growth


def main() -> None:
    """The child's end: build, say so, then serve requests until the input ends."""
    factory, payload, threads = sys.argv[1:]
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries print where they like
    import torch

    torch.set_num_threads(int(threads))
    module, _, name = factory.partition(":")
    stepper: Stepper = getattr(importlib.import_module(module, __package__), name)(**json.loads(payload))
    replies.write(json.dumps({"bytes_moved": stepper.bytes_moved}) + "\n")
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "warm_up":
            reply: dict[str, Any] = {"note": stepper.warm_up()}
        elif request["do"] == "peak":
            reply = {"bytes": peak_bytes_of(stepper.step)}
        else:
            reply = {"step": _measure(stepper, request["seconds"])}
        replies.write(json.dumps(reply) + "\n")
    stepper.close()


if __name__ == "__main__":
    main()
