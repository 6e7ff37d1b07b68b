"""Starting and ending the world of ranks that this process belongs to."""

import datetime
import gc
import os
import socket
from collections.abc import Callable

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist

from .failure import Failure, LostRank, Patience, describe
from .launchers import Place, device_of
from .meeting import meet
from .roll_call import Arrival, call_roll
from .watch import Watch

_NOTHING = Arrival()
_watch: Watch | None = None  # one for each process, like torch.distributed's default group
_rank = 0  # of this process, once it is known


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
    global _watch, _rank
    _rank = place.rank
    patience = Patience(timeout)
    on_cuda = torch.cuda.is_available()
    os.environ.setdefault("LOCAL_RANK", str(place.local_rank))  # DeepSpeed refuses to start without it
    if on_cuda:
        torch.cuda.set_device(device_of(place, torch.cuda.device_count()))
    if place.world == 1:
        store: dist.Store = dist.HashStore()
    else:
        meeting = meet(patience)
        roll = call_roll(
            dist.PrefixStore("moescale", meeting.store),
            place.rank,
            place.world,
            socket.gethostname(),
            arrival,
            patience.wait,
        )
        store = roll.store
        watched = dist.PrefixStore("watch", store)
        _watch = Watch(watched, place.rank, meeting.address, roll.hosts, patience, patience.settle, last_words)
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
    return Failure((_rank,), describe(error))


def leave() -> None:
    """Leave the world; safe when it was never joined."""
    global _watch
    if dist.is_initialized():
        dist.destroy_process_group()
        # A traceback in a cycle keeps its frames' groups, and a group its threads. A thread that still has a tensor to
        # give back when the interpreter ends aborts the process: "terminate called without an active exception".
        gc.collect()
    if _watch is not None:
        _watch.close()
        _watch = None
