"""What a training process needs in its environment before it starts, and starting it again with that.

glibc gives freed memory back to the system, and asks for large blocks with mmap, so each fresh activation tensor is
paid for with page faults; they cost more than the arithmetic of small models (a gather of 4096 rows went from 39 to
15 ms without them). glibc reads the settings once, before main, so a process that lacks them has to be replaced.
"""

import itertools
import os
import platform
import sys
from pathlib import Path

from ..parallel.launchers import find_place

# Keep what was freed: never trim the heap, serve blocks up to 4 GiB from it instead of by mmap (glibc's own limit is
# 32 MiB, which the activations of larger models pass), grow it in large steps, and back it with huge pages where the
# kernel has them (a pass over fresh 64 MB went from 55 to 25 ms). The process holds on to its peak.
ALLOCATOR = {
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
    "MALLOC_TOP_PAD_": str(64 << 20),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


def cuda_devices(nodes: Path = Path("/dev")) -> list[str]:
    """The NVIDIA devices that this process may use, by their names in CUDA_VISIBLE_DEVICES; known without torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not (nodes / "nvidiactl").exists():
        return []
    if visible is None:
        return sorted((node.name.removeprefix("nvidia") for node in nodes.glob("nvidia[0-9]*")), key=int)
    names = [name.strip() for name in visible.split(",")]
    return list(itertools.takewhile(lambda name: name not in ("", "-1"), names))  # CUDA ignores what follows those


def missing_allocator_settings() -> dict[str, str]:
    """The settings that this process was started without; what the user has set stays as it is."""
    if platform.libc_ver()[0] != "glibc" or cuda_devices():
        return {}
    return {key: value for key, value in ALLOCATOR.items() if key not in os.environ}


def restart_with_allocator_settings() -> None:
    """Replace this process by itself with the allocator settings; returns at once where they are set.

    Called before anything heavy is imported. The process keeps its id, so launchers notice nothing.
    """
    missing = missing_allocator_settings()
    if missing:
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **missing})


def world_of_launcher() -> tuple[int, int]:
    """(rank, world size) by torchrun, srun or mpirun; (0, 1) when started alone.

    Raises:
        UserError: their variables contradict each other.
    """
    place = find_place()
    return place.rank, place.world


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0))
