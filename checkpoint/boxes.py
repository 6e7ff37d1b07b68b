"""Cutting what a rank holds into boxes of logical tensors.

A rank under ZeRO 1 holds flat ranges of its local parameters. A piece of a local parameter lies in it as runs of equal
length, in the order of the piece's own elements; so what a flat range has of a piece is a range of the piece's
elements, and that is at most three boxes of a matrix: the rest of a row, whole rows, the beginning of a row.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..models.names import Piece

Place = tuple[tuple[int, ...], tuple[int, ...]]  # (start, shape) of a box inside a tensor


@dataclass(frozen=True)
class Box:
    """A box of one part of a logical tensor, with its values in the box's shape."""

    part: str
    piece: Piece
    values: Tensor


@dataclass(frozen=True)
class Cut:
    """A box, and where its elements lie in a flat range: stretches of (first element, length), in order."""

    piece: Piece
    stretches: tuple[tuple[int, int], ...]

    @property
    def is_view(self) -> bool:
        """Whether its elements lie together, so that `read` copies nothing."""
        return len(self.stretches) == 1

    def read(self, flat: Tensor) -> Tensor:
        """The box's values out of the range."""
        parts = [flat.narrow(0, first, length) for first, length in self.stretches]
        return (parts[0] if self.is_view else torch.cat(parts)).view(self.piece.extent)

    def bytes_in(self, flat: memoryview, size: int) -> memoryview:
        """The box's bytes out of the range's; an element has ``size`` of them."""
        parts = [flat[first * size : (first + length) * size] for first, length in self.stretches]
        return parts[0] if self.is_view else memoryview(b"".join(parts))

    def write(self, flat: Tensor, box: Tensor) -> None:
        """Store the box's values into the range."""
        values, done = box.reshape(-1), 0
        for first, length in self.stretches:
            flat.narrow(0, first, length).copy_(values.narrow(0, done, length))
            done += length


@dataclass(frozen=True)
class Held:
    """A flat range of one part of a local tensor, and the boxes that make it up."""

    part: str
    cuts: tuple[Cut, ...]
    values: Tensor

    def boxes(self) -> Iterator[Box]:
        for cut in self.cuts:
            yield Box(self.part, cut.piece, cut.read(self.values))


def cuts_of(pieces: Iterable[Piece], shape: tuple[int, ...], first: int, last: int) -> tuple[Cut, ...]:
    """The boxes in elements ``first`` to ``last`` of a flattened local tensor of ``shape`` with these pieces."""
    return tuple(cut for piece in pieces for cut in _cuts_of_piece(piece, shape, first, last))


def _cuts_of_piece(piece: Piece, shape: tuple[int, ...], first: int, last: int) -> Iterator[Cut]:
    starts, length = _runs(piece, shape)
    inside = []  # (element of the piece, place in the range, number of elements) of each run's share
    for index, start in enumerate(starts):
        begin, end = max(start, first), min(start + length, last)
        if begin < end:
            inside.append((index * length + begin - start, begin - first, end - begin))
    if not inside:
        return
    for place in boxes_of_range(piece.extent, inside[0][0], inside[-1][0] + inside[-1][2]):
        start_in_piece, extent = place
        begin = sum(s * math.prod(piece.extent[d + 1 :]) for d, s in enumerate(start_in_piece))
        end = begin + math.prod(extent)
        stretches = tuple(
            (at + max(begin - element, 0), min(end, element + count) - max(begin, element))
            for element, at, count in inside
            if element < end and element + count > begin
        )
        start_in_tensor = tuple(mine + theirs for mine, theirs in zip(piece.start, start_in_piece, strict=True))
        yield Cut(replace(piece, start=start_in_tensor, extent=extent), stretches)


def _runs(piece: Piece, shape: tuple[int, ...]) -> tuple[list[int], int]:
    """Where the runs of a piece begin in its flattened local tensor, and their common length."""
    view = piece.view(torch.empty(shape, device="meta"))  # knows places, and holds nothing
    sizes, strides, length = list(view.shape), list(view.stride()), 1
    while sizes and (strides[-1] == length or sizes[-1] == 1):
        length *= sizes.pop()
        strides.pop()
    starts = torch.tensor([int(view.storage_offset())])
    for size, stride in zip(sizes, strides, strict=False):
        starts = (starts[:, None] + torch.arange(size) * stride).flatten()
    return starts.tolist(), length


def boxes_of_range(extent: tuple[int, ...], first: int, last: int) -> Iterator[Place]:
    """The boxes that make up elements ``first`` to ``last`` of a tensor of shape ``extent``.

    In order; one for a vector, at most three for a matrix.
    """
    if first == last:
        return
    if len(extent) == 1:
        yield (first,), (last - first,)
        return
    row = math.prod(extent[1:])
    head, tail = -(-first // row), last // row  # whole rows
    if head > tail:
        yield from _in_row(extent, tail, first, last)
        return
    yield from _in_row(extent, head - 1, first, head * row)
    if head < tail:
        yield (head, *(0 for _ in extent[1:])), (tail - head, *extent[1:])
    yield from _in_row(extent, tail, tail * row, last)


def _in_row(extent: tuple[int, ...], index: int, first: int, last: int) -> Iterator[Place]:
    before = index * math.prod(extent[1:])
    for start, shape in boxes_of_range(extent[1:], first - before, last - before):
        yield (index, *start), (1, *shape)
