"""An exchange as a plan that is used several times, and in two halves: start it, do other work, wait for it.

`Moves` is the arithmetic, without tensors: which rows go to whom and where those of others come to lie. The flat plan
and the first step of the two-level plan (two_level.py) are such moves; collective.py and nccl.py carry them out.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from .protocol import Exchange


@dataclass(frozen=True)
class Segment:
    """``rows`` consecutive rows of a buffer from row ``first``, which go to or come from ``peer``."""

    peer: int
    first: int
    rows: int


@dataclass(frozen=True)
class Moves:
    """What one rank sends and receives. Between two ranks segments arrive in the order in which they were sent.

    Attributes:
        sends: segments of the rows given.
        receives: segments of the rows made.
        peers: ranks in the group.
    """

    sends: tuple[Segment, ...]
    receives: tuple[Segment, ...]
    peers: int

    @classmethod
    def flat(cls, sent: Sequence[int], received: Sequence[int]) -> Self:
        """``sent[p]`` consecutive rows to peer p, ``received[p]`` from it, by peer on both sides."""
        return cls(consecutive(sent), consecutive(received), len(sent))

    @property
    def leaving(self) -> int:
        """Rows sent, those to oneself included."""
        return sum(segment.rows for segment in self.sends)

    @property
    def arriving(self) -> int:
        """Rows received, those from oneself included."""
        return sum(segment.rows for segment in self.receives)

    def reversed(self) -> Self:
        """Every row back to where it came from."""
        return type(self)(self.receives, self.sends, self.peers)


def consecutive(rows: Sequence[int]) -> tuple[Segment, ...]:
    """Segments by peer without gaps."""
    ends = itertools.accumulate(rows)
    return tuple(Segment(peer, end - count, count) for peer, (count, end) in enumerate(zip(rows, ends, strict=True)))


class Transfer(Protocol):
    """Rows under way. What it reads and writes must stay untouched until it has been waited for."""

    def wait(self) -> Tensor:
        """The rows, ready for whatever the caller does next (on CUDA: on the current stream)."""

    def relay(self) -> Tensor:
        """The rows, ready to be given to another transfer of the same exchange; need not be waited for besides."""


class Plan(Protocol):
    """Which rows go where. Ranks start the plans of a group in the same order."""

    @property
    def leaving(self) -> int:
        """Rows given."""

    @property
    def arriving(self) -> int:
        """Rows made."""

    def start(self, rows_RD: Tensor, into_RD: Tensor) -> Transfer:
        """Send the rows of ``[leaving, D]``; those received are written to ``[arriving, D]``. Both contiguous."""

    def reversed(self) -> "Plan":
        """The plan that takes every row back."""


@runtime_checkable
class PlannedExchange(Exchange, Protocol):
    """An exchange whose transfers go on while the rank computes."""

    def plans(
        self, sent_CP: Sequence[Sequence[int]], received_CP: Sequence[Sequence[int]], device: torch.device
    ) -> list[Plan]:
        """Plans of C exchanges, each as `Exchange.rows` with the same counts. A collective call.

        Args:
            device: where the rows will be.
        """


def move(rows_RD: Tensor, plan: Plan) -> Tensor:
    """Carry out a plan, differentiably: ``[leaving, D] -> [arriving, D]``."""
    return _Move.apply(rows_RD, plan)


def start(rows_RD: Tensor, plan: Plan) -> Transfer:
    """Start a plan; not differentiable."""
    return plan.start(rows_RD, rows_RD.new_empty(plan.arriving, *rows_RD.shape[1:]))


class _Move(torch.autograd.Function):
    """The gradient goes back the way that the rows came."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, plan: Plan) -> Tensor:
        ctx.plan = plan
        return start(rows.contiguous(), plan).wait()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return start(gradients[0].contiguous(), ctx.plan.reversed()).wait(), None
