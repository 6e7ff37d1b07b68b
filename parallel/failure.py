"""Who ended a run of several ranks and why, and how long it may take to find out."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist

from ..base.errors import UserError

# What gloo, NCCL and our own exchanges say, in plain RuntimeErrors, when a peer is gone, silent or has given up.
_CONTACT_LOST = ("/gloo/", "caused pair closure", "Connection closed by peer", "NCCL", "an exchange through")
_TIMED_OUT = ("timed out", "timeout")

DIED = "ended without a word (killed, crashed, or the host out of memory)"


@dataclass(frozen=True)
class Patience:
    """How ``runtime.timeout`` is spent, in seconds.

    Collectives and silent ranks are given up after `wait`, so that `margin` is left to find out whose fault it was
    and to end within the timeout.
    """

    timeout: float

    @property
    def margin(self) -> float:
        return min(self.timeout / 5, 20.0)

    @property
    def wait(self) -> float:
        return self.timeout - self.margin

    @property
    def settle(self) -> float:
        """For the complaints of other ranks to come in; and as long for a rank to end, once it is known who failed."""
        return self.margin / 2

    @property
    def beat(self) -> float:
        """Between two signs of life."""
        return min(self.timeout / 40, 5.0)


@dataclass(frozen=True)
class Failure:
    """The end of a run: the ranks at fault, and a sentence that names them, their hosts and the cause."""

    ranks: tuple[int, ...]
    text: str


class LostRank(Exception):
    """Ranks of the world are missing or gone."""

    def __init__(self, failure: Failure):
        super().__init__(failure.text)
        self.failure = failure


def name_ranks(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """Ranks with their hosts: ``rank 3 on node-b``, ``ranks 2, 3 on node-b and rank 5 on node-c``."""
    by_host: dict[str, list[int]] = {}
    for rank in ranks:
        by_host.setdefault(hosts[rank], []).append(rank)
    return " and ".join(
        f"rank{'s' if len(members) > 1 else ''} {', '.join(map(str, members))} on {host}"
        for host, members in by_host.items()
    )


def silent_for(seconds: float) -> str:
    """What is said of a rank that gives no sign of life."""
    return f"not heard from for {seconds:.0f} s: stopped, powered off or cut off from the network"


def describe(error: BaseException) -> str:
    """An error in one line: its kind and what it says; a user's error says enough."""
    said = " ".join(str(error).split())
    if isinstance(error, UserError):
        return said
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def lost_contact(error: BaseException) -> bool:
    """Whether ``error`` is what a rank sees when another one fails, and so says nothing about this one."""
    if isinstance(error, (LostRank, dist.DistError, ConnectionError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _CONTACT_LOST)


def timed_out(error: BaseException) -> bool:
    """Whether contact was lost by waiting in vain, not because a connection broke."""
    return any(sign in str(error).lower() for sign in _TIMED_OUT)
