"""A world of any size seen by one of its ranks, in one process: groups are made, messages go nowhere."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import deepspeed
import deepspeed.ops
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore


@contextmanager
def fake_world(rank: int, world: int) -> Iterator[None]:
    """Be rank ``rank`` of ``world`` while the body works: for shapes and membership, not for values.

    Raises:
        ValueError: this process is in a world already.
    """
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed refuses to start without it
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        deepspeed.init_distributed(dist_backend="fake", verbose=False)
        yield
    finally:
        dist.destroy_process_group()
