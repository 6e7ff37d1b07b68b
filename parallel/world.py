"""Starting and ending the world of ranks that this process belongs to."""

import datetime
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist

from ..base.errors import UserError
from .failure import Failure, LostRank, Patience, describe
from .roll_call import Arrival, call_roll
from .watch import Watch

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_NOTHING = Arrival()
_watch: Watch | None = None  # one for each process, like torch.distributed's default group


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


def _say_nothing(failure: Failure) -> None:
    pass


def start(
    place: Place, timeout: float, arrival: Arrival = _NOTHING, last_words: Callable[[Failure], None] = _say_nothing
) -> None:
    """Join the world: NCCL where CUDA exists, else gloo; a world of one needs no network at all.

    Args:
        timeout: seconds after which a silent or missing rank is an error.
        arrival: what this rank brings to be compared with the others.
        last_words: called with the failure when another rank's end leaves this one no other way out than ending its
            process.

    Raises:
        UserError: ranks differ, or one objects.
        LostRank: ranks are missing, or rank 0 cannot be reached.
    """
    global _watch
    patience = Patience(timeout)
    on_cuda = torch.cuda.is_available()
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed refuses to start without it
    if on_cuda:
        torch.cuda.set_device(place.local_rank)
    if place.world == 1:
        store: dist.Store = dist.HashStore()
    else:
        roll = call_roll(
            dist.PrefixStore("moescale", _open_store(place, patience)),
            place.rank,
            place.world,
            socket.gethostname(),
            arrival,
            patience.wait,
        )
        store = roll.store
        meeting = dist.PrefixStore("watch", store)
        _watch = Watch(
            meeting, place.rank, os.environ["MASTER_ADDR"], roll.hosts, patience, patience.settle, last_words
        )
    dist.init_process_group(
        "nccl" if on_cuda else "gloo",
        store=dist.PrefixStore("default", store),
        rank=place.rank,
        world_size=place.world,
        timeout=_collective_timeout(timeout),
    )
    # On CPU DeepSpeed would compile a shared-memory operator for 40 to 70 seconds.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)


def _open_store(place: Place, patience: Patience) -> dist.Store:
    """Rank 0's store, or that of torchrun's agent on rank 0's host."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    held_by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        return dist.TCPStore(
            address,
            port,
            place.world,
            is_master=place.rank == 0 and not held_by_agent,
            timeout=datetime.timedelta(seconds=patience.wait),
            wait_for_workers=False,  # the roll call waits, and says who is missing
            multi_tenant=True,
        )
    except dist.DistError as error:
        raise LostRank(
            Failure(
                (0,),
                f"rank {place.rank} on {socket.gethostname()} found nobody at MASTER_ADDR {address}, "
                f"MASTER_PORT {port} within {patience.wait:g} s; is rank 0 started there, and may hosts connect to "
                f"that port? ({str(error).splitlines()[0]})",
            )
        ) from None


def _collective_timeout(timeout: float) -> datetime.timedelta:
    """How long a collective may wait.

    gloo's raise an error after that, which leaves time to ask who is missing. NCCL's own watchdog aborts the process
    without asking, so it comes last.
    """
    return datetime.timedelta(seconds=timeout if torch.cuda.is_available() else Patience(timeout).wait)


def limit_waits(timeout: float) -> None:
    """Let no collective of any group wait longer than `start` was told.

    Libraries make groups with time limits of their own (30 minutes in Megatron and DeepSpeed), so call this when all
    groups are made.
    """
    for group in dist.distributed_c10d._world.pg_map:
        dist.distributed_c10d._set_pg_timeout(_collective_timeout(timeout), group)


def blame(error: BaseException) -> Failure:
    """Who ended the run and why, given what ended it on this rank. The other ranks learn it; they may know better."""
    if isinstance(error, LostRank):
        return error.failure
    if _watch is not None:
        return _watch.blame(error)
    rank = dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))
    return Failure((rank,), describe(error))


def leave() -> None:
    """Leave the world; safe when it was never joined."""
    global _watch
    if dist.is_initialized():
        dist.destroy_process_group()
    if _watch is not None:
        _watch.close()
        _watch = None
