"""A run's state as named logical tensors, in whatever layout holds it.

Three parts for each parameter: ``master`` (fp32 weights), ``exp_avg`` and ``exp_avg_sq`` (Adam's moments). A rank
under ZeRO 1 holds flat ranges of its parameters and stores and loads just these, as boxes of logical tensors: no rank
ever gathers a tensor. A fourth part, ``buffer``, is what layers carry from step to step besides parameters: whole
tensors, alike on every rank that holds the layer.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..models.names import Buffer, Entry, Piece
from ..parallel.engine import Engine, Slice
from .boxes import Box, Cut, Held, cuts_of

MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")
PARTS = (MASTER, *MOMENTS)
BUFFER = "buffer"


class BoxReader(Protocol):
    """Where logical tensors come from: see `checkpoint.storage.Checkpoint`."""

    def tensors(self, part: str) -> dict[str, tuple[int, ...]]:
        """Names and shapes of what there is of a part."""

    def read(self, part: str, piece: Piece, values: Tensor) -> None:
        """Fill ``values``, of the shape of ``piece``."""


class LogicalState:
    """The bridge between an engine's slices and logical tensors.

    Args:
        entries: every local parameter.
        buffers: what its layers carry besides parameters; loaded in place.
    """

    def __init__(self, engine: Engine, entries: Mapping[str, Entry], buffers: Sequence[Buffer]):
        self.engine = engine
        self.entries = entries
        self.buffers = buffers
        self._expert_replica = dist.get_rank(engine.groups.expert_data)
        self._entry_of = {entry.parameter: entry for entry in entries.values()}
        self._known_cuts: dict[tuple[nn.Parameter, int, int], tuple[Cut, ...]] = {}

    def boxes(self) -> Iterator[Box]:
        """What this rank is the one to store; every element of the state is on exactly one rank."""
        for held in self.held():
            yield from held.boxes()

    def held(self) -> list[Held]:
        """What this rank is the one to store, as it lies in memory: the next step changes it."""
        slices = list(self.engine.slices())
        found: list[Held] = []
        # Before the first step there are no moments, and plain gradient descent never has any: then none are stored.
        for part in (MASTER, *(m for m in MOMENTS if any(m in owned.moments for owned in slices))):
            found += self.held_as(part, ((s.parameter, s.start, _values(s, part)) for s in slices))
        groups = self.engine.groups
        if groups.topology.data_rank(groups.rank) == 0 and groups.topology.tensor_rank(groups.rank) == 0:
            for buffer in self.buffers:
                cuts = cuts_of([buffer.piece], tuple(buffer.values.shape), 0, buffer.values.numel())
                found.append(Held(BUFFER, cuts, buffer.values.reshape(-1)))
        return found

    def held_as(self, part: str, ranges: Iterable[tuple[nn.Parameter, int, Tensor]]) -> Iterator[Held]:
        """Anything that lies like slices, (parameter, first element, flat values), as far as this rank stores it."""
        for parameter, start, values in ranges:
            if self._stores(self._entry_of[parameter]):
                yield Held(part, self._cuts(parameter, start, values.numel()), values)

    def load(self, reader: BoxReader) -> None:
        """Set masters, moments, model parameters and buffers from logical tensors, on all ranks together.

        Moments are zero where there are none of them to load.
        """
        self.read(reader)
        self.engine.publish_masters()

    def read(self, reader: BoxReader) -> None:
        """The part of `load` that needs no other rank: everything but the model's parameters."""
        stored = {part for part in PARTS if part == MASTER or reader.tensors(part)}
        if stored != {MASTER}:
            self.engine.prepare_moments()
        for owned in self.engine.slices():
            cuts = self._cuts(owned.parameter, owned.start, owned.master.numel())
            for part in (MASTER, *owned.moments):
                values = _values(owned, part)
                if part not in stored:
                    values.zero_()
                    continue
                for cut in cuts:
                    box = cut.read(values)
                    reader.read(part, cut.piece, box)
                    if not cut.is_view:
                        cut.write(values, box)
        for buffer in self.buffers:
            reader.read(BUFFER, buffer.piece, buffer.values)

    def _cuts(self, parameter: nn.Parameter, start: int, count: int) -> tuple[Cut, ...]:
        key = (parameter, start, count)
        if key not in self._known_cuts:
            pieces = self._entry_of[parameter].pieces
            self._known_cuts[key] = cuts_of(pieces, tuple(parameter.shape), start, start + count)
        return self._known_cuts[key]

    def _stores(self, entry: Entry) -> bool:
        """Whether this rank stores what it holds of a parameter: under ZeRO 1 replicas share it out among them."""
        groups, role = self.engine.groups, entry.role
        topology, rank = groups.topology, groups.rank
        if role.tied_copy:
            return False
        if not self.engine.zero:
            replica = self._expert_replica if role.expert else topology.data_rank(rank)
            if replica != 0:
                return False
        return role.differs_over_tensor(topology) or topology.tensor_rank(rank) == 0


def _values(owned: Slice, part: str) -> Tensor:
    if part == MASTER:
        return owned.master
    # A parameter that has had no gradient yet has no moments of its own: they are zero.
    return owned.moments[part] if part in owned.moments else torch.zeros_like(owned.master)
