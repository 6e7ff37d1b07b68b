"""How long a process waits for the others, and whom it blames."""

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
