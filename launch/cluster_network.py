"""How fast ranks of different hosts reach each other, and how far their clocks are apart, for ``doctor --cluster``.

Collective: every rank of the default group makes the same calls. Pairs are measured one after another, so that none
shares a cable with the next.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

_MESSAGE = 4 << 20  # bytes
_TURNS = 5
_SMALL_TURNS = 40


@dataclass(frozen=True)
class Link:
    """From a rank to another, one way.

    Attributes:
        bandwidth: bytes/s of messages of 4 MiB, the median of five there and back.
        latency: seconds that a message of 8 bytes takes, half of the median time there and back.
    """

    source: int
    target: int
    bandwidth: float
    latency: float


@dataclass(frozen=True)
class Clock:
    """A rank's clock against rank 0's: it is ``ahead`` seconds, known to within ``error``."""

    rank: int
    ahead: float
    error: float


def measure_links(pairs: Sequence[tuple[int, int]]) -> list[Link]:
    """Over NCCL between devices, over gloo else. A rank learns of the pairs that it is the first of."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    links = []
    for source, target in pairs:
        if dist.get_rank() in (source, target):
            peer = target if dist.get_rank() == source else source
            small, large = torch.zeros(8, dtype=torch.uint8), torch.zeros(_MESSAGE, dtype=torch.uint8)
            first = dist.get_rank() == source
            latency = statistics.median(_there_and_back(small.to(device), peer, first, _SMALL_TURNS)) / 2
            seconds = statistics.median(_there_and_back(large.to(device), peer, first, _TURNS)) / 2
            links += [Link(source, target, _MESSAGE / seconds, latency)] * first
        dist.barrier()
    return links


def measure_clocks(ranks: Sequence[int]) -> list[Clock]:
    """Each of ``ranks`` asks rank 0 for the time; it learns its own result.

    The answer that came fastest is the best: it was on its way for an unknown part of that time, hence the error.
    """
    clocks = []
    for rank in ranks:
        told = torch.zeros(1, dtype=torch.float64)
        if dist.get_rank() == 0:
            for _ in range(_SMALL_TURNS):
                dist.recv(told, rank)
                told[0] = time.time()
                dist.send(told, rank)
        elif dist.get_rank() == rank:
            clocks.append(min((_ask_time(told, rank) for _ in range(_SMALL_TURNS)), key=lambda clock: clock.error))
        dist.barrier()
    return clocks


def _ask_time(told: torch.Tensor, rank: int) -> Clock:
    asked = time.time()
    dist.send(told, 0)
    dist.recv(told, 0)
    answered = time.time()
    return Clock(rank, (asked + answered) / 2 - float(told), (answered - asked) / 2)


def _there_and_back(message: torch.Tensor, peer: int, first: bool, turns: int) -> list[float]:
    """Seconds of each turn but the first, which sets up the connection."""
    seconds = []
    for _ in range(turns + 1):
        began = time.perf_counter()
        for sends in (first, not first):
            if sends:
                dist.send(message, peer)
            else:
                dist.recv(message, peer)
        if message.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return seconds[1:]
