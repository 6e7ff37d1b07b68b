"""Plans carried out by asynchronous collectives of torch.distributed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from .plan import Moves, Segment


@dataclass(frozen=True)
class CollectivePlan:
    """`Moves` as one asynchronous ``all_to_all_single``.

    The collective takes and leaves rows by peer. Moves whose segments lie otherwise are copied into that order before,
    or out of it afterwards.
    """

    group: ProcessGroup
    moves: Moves

    @property
    def leaving(self) -> int:
        return self.moves.leaving

    @property
    def arriving(self) -> int:
        return self.moves.arriving

    def reversed(self) -> Self:
        return type(self)(self.group, self.moves.reversed())

    def start(self, rows_RD: Tensor, into_RD: Tensor) -> "CollectiveTransfer":
        sends, receives = by_peer(self.moves.sends), by_peer(self.moves.receives)
        packed = rows_RD if in_order(sends) else torch.cat(pieces(rows_RD, sends))
        buffer = into_RD if in_order(receives) else torch.empty_like(into_RD)
        work = dist.all_to_all_single(
            buffer,
            packed,
            rows_of_peers(receives, self.moves.peers),
            rows_of_peers(sends, self.moves.peers),
            group=self.group,
            async_op=True,
        )
        return CollectiveTransfer(work, packed, buffer, into_RD, receives)


@dataclass
class CollectiveTransfer:
    """An asynchronous collective, and what it reads and writes."""

    work: dist.Work
    packed: Tensor
    buffer: Tensor
    into: Tensor
    receives: Sequence[Segment]

    def wait(self) -> Tensor:
        self.work.wait()
        if self.buffer is not self.into:
            parts = self.buffer.split([segment.rows for segment in self.receives])
            for piece, part in zip(pieces(self.into, self.receives), parts, strict=True):
                piece.copy_(part)
        return self.into

    def relay(self) -> Tensor:
        return self.wait()


def by_peer(segments: Sequence[Segment]) -> list[Segment]:
    """Segments that hold rows, by peer; those of one peer in their order."""
    return sorted((segment for segment in segments if segment.rows), key=lambda segment: segment.peer)


def in_order(segments: Sequence[Segment]) -> bool:
    """Whether the segments lie one behind the other."""
    end = 0
    for segment in segments:
        if segment.first != end:
            return False
        end += segment.rows
    return True


def pieces(rows_RD: Tensor, segments: Sequence[Segment]) -> list[Tensor]:
    """Views of the segments."""
    return [rows_RD.narrow(0, segment.first, segment.rows) for segment in segments]


def rows_of_peers(segments: Sequence[Segment], peers: int) -> list[int]:
    """Rows to or from each peer."""
    rows = [0] * peers
    for segment in segments:
        rows[segment.peer] += segment.rows
    return rows
