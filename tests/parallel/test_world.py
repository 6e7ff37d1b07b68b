"""How long a process waits for the others, and whom it blames."""

import os
import subprocess
import sys
from typing import Any

import torch
import torch.distributed as dist

from moescale.base.errors import UserError
from moescale.parallel.failure import Patience
from moescale.parallel.world import blame, limit_waits


def test_no_group_waits_longer_than_told(one_rank: Any) -> None:
    """Megatron and DeepSpeed make groups with time limits of 30 minutes."""

    def limits() -> set[float]:
        groups = dist.distributed_c10d._world.pg_map
        return {group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups}

    limit_waits(60)
    assert limits() == {Patience(60).wait}


def test_alone_there_is_nobody_else_to_blame() -> None:
    assert blame(MemoryError("no room")).text == "MemoryError: no room"
    assert blame(UserError("training.steps (0): too few")).text == "training.steps (0): too few"


KEPT_BY_A_TRACEBACK = """
from pathlib import Path
import torch
import torch.distributed as dist
from moescale.parallel.world import leave

def fails(group):
    kept = {}
    try:
        raise ValueError
    except ValueError as error:
        kept["error"] = error
    kept["itself"] = kept

def threads():
    return [name for name in (path.read_text() for path in Path("/proc/self/task").glob("*/comm")) if "gloo" in name]

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
dist.all_reduce(torch.ones(1))
fails(dist.group.WORLD)
assert threads()
leave()
assert not threads(), threads()
"""


def test_no_thread_of_a_group_outlives_the_world() -> None:
    """One that frees a tensor while the interpreter ends aborts the process, seldom."""
    done = subprocess.run(
        [sys.executable, "-c", KEPT_BY_A_TRACEBACK],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
