"""A limit on the memory of a process and its children that the kernel keeps by killing: a cgroup of our own."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_V1 = Path("/sys/fs/cgroup/memory")
_V2 = Path("/sys/fs/cgroup")


def unable() -> str:
    """Why this process cannot make such a group; empty if it can."""
    if os.geteuid() != 0:
        return "needs root, for a cgroup with a limit on memory"
    v2 = _V2 / "cgroup.subtree_control"
    if (_V1 / "cgroup.procs").exists() or (v2.exists() and "memory" in v2.read_text().split()):
        return ""
    return "needs a memory cgroup that this process may make: version 1, or version 2 with the memory controller"


@contextmanager
def memory_limit(size: int) -> Iterator[Callable[[], None]]:
    """Yields what a child calls between fork and exec to be held to ``size`` bytes, its own children included."""
    old = (_V1 / "cgroup.procs").exists()
    group = (_V1 if old else _V2) / f"moescale{os.getpid()}"
    group.mkdir()
    try:
        for name in ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes") if old else ("memory.max",):
            with suppress(FileNotFoundError):  # no account of swap
                (group / name).write_text(str(size))
        yield lambda: (group / "cgroup.procs").write_text(str(os.getpid())) and None
    finally:
        deadline = time.monotonic() + 10
        while group.exists() and time.monotonic() < deadline:
            with suppress(OSError):
                group.rmdir()
            time.sleep(0.1)
