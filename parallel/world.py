"""Starting and ending the world of ranks that this process belongs to."""

import datetime
import os
from dataclasses import dataclass

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist

from ..base.errors import UserError

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Place:
    """This process among the ranks."""

    rank: int
    world: int
    local_rank: int
    local_world: int

    @classmethod
    def from_environment(cls) -> "Place":
        """As torchrun says, or alone when nobody says anything.

        Raises:
            UserError: some of torchrun's variables are set and others are not; a silent world of one would train
                as many separate models as there are processes.
        """
        given = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
        if "RANK" not in given and "WORLD_SIZE" not in given:
            return cls(0, 1, 0, 1)
        missing = [name for name in _VARIABLES if name not in given]
        if missing:
            raise UserError(
                f"the environment gives {', '.join(given)} but not {', '.join(missing)}; start with torchrun, or unset "
                "them"
            )
        local_world = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return cls(int(given["RANK"]), int(given["WORLD_SIZE"]), int(given["LOCAL_RANK"]), local_world)


def start(place: Place, timeout: float) -> None:
    """Join the world: NCCL where CUDA exists, else gloo; a world of one needs no network at all.

    Args:
        timeout: seconds after which a collective with a silent peer is an error.
    """
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed refuses to start without it
    patience = datetime.timedelta(seconds=timeout)
    if torch.cuda.is_available():
        torch.cuda.set_device(place.local_rank)
    if place.world == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=patience)
    else:
        dist.init_process_group(backend, timeout=patience)
    # On CPU DeepSpeed would compile a shared-memory operator for 40 to 70 seconds.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=backend, verbose=False)


def leave() -> None:
    """Leave the world; safe when it was never joined."""
    if dist.is_initialized():
        dist.destroy_process_group()
