"""A run's state as named logical tensors, gathered from and scattered to whatever layout holds it.

Three parts for each parameter: ``master`` (fp32 weights), ``exp_avg`` and ``exp_avg_sq`` (Adam's moments). A rank
under ZeRO 1 holds flat ranges of its parameters; here each parameter's ranges are summed over its replicas into
whole local tensors, which the name map cuts into boxes of logical tensors. A fourth part, ``buffer``, is what layers
carry from step to step besides parameters: whole tensors, alike on every rank that holds the layer.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..models.names import Buffer, Entry, Piece
from ..parallel.engine import Engine, Slice

PARTS = ("master", "exp_avg", "exp_avg_sq")
BUFFER = "buffer"


@dataclass(frozen=True)
class Box:
    """A box of one part of a logical tensor, with its values in the box's shape."""

    part: str
    piece: Piece
    values: Tensor


class BoxReader(Protocol):
    """Where logical tensors come from: see `checkpoint.storage.Checkpoint`."""

    def box(self, part: str, piece: Piece) -> Tensor:
        """Values of ``piece`` in its box's shape, float32."""


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

    def boxes(self) -> Iterator[Box]:
        """The whole state: every box that this rank is the one to store, every element on one rank.

        All ranks of the world must iterate together: each part is summed over replicas on the way.
        """
        slices = list(self.engine.slices())
        for part in PARTS:
            # Before the first step there are no moments: they are zero.
            held = [(s.parameter, s.start, _values(s, part)) for s in slices if part == "master" or part in s.moments]
            yield from self.boxes_of(part, held)
        groups = self.engine.groups
        if groups.topology.data_rank(groups.rank) == 0 and groups.topology.tensor_rank(groups.rank) == 0:
            yield from (Box(BUFFER, buffer.piece, buffer.values.cpu()) for buffer in self.buffers)

    def boxes_of(self, part: str, held: Iterable[tuple[nn.Parameter, int, Tensor]]) -> Iterator[Box]:
        """Boxes of anything that is held like slices: (parameter, first element, flat values); the rest is zero."""
        by_parameter: dict[int, list[tuple[int, Tensor]]] = {}
        for parameter, start, values in held:
            by_parameter.setdefault(id(parameter), []).append((start, values))
        for entry in self.entries.values():
            local = self._whole_local(entry, by_parameter.get(id(entry.parameter), []))
            if self._stores(entry):
                for piece in entry.pieces:
                    yield Box(part, piece, piece.read(local))

    def load(self, reader: BoxReader) -> None:
        """Set masters, moments, model parameters and buffers from logical tensors."""
        self.engine.prepare_moments()
        slices: dict[int, list[Slice]] = {}
        for owned in self.engine.slices():
            slices.setdefault(id(owned.parameter), []).append(owned)
        for part in PARTS:
            for entry in self.entries.values():
                local = torch.empty(entry.parameter.shape, dtype=torch.float32)
                for piece in entry.pieces:
                    piece.write(local, reader.box(part, piece))
                for owned in slices.get(id(entry.parameter), []):
                    target = _values(owned, part)
                    target.copy_(local.view(-1).narrow(0, owned.start, target.numel()))
        self.engine.publish_masters()
        for buffer in self.buffers:
            buffer.values.copy_(reader.box(BUFFER, buffer.piece))

    def _whole_local(self, entry: Entry, ranges: list[tuple[int, Tensor]]) -> Tensor:
        """This rank's whole local tensor in fp32, its ranges summed over the ranks that hold replicas."""
        groups = self.engine.groups
        group = groups.expert_data if entry.role.expert else groups.data
        local = torch.zeros(entry.parameter.shape, dtype=torch.float32, device=entry.parameter.device)
        for start, values in ranges:
            local.view(-1).narrow(0, start, values.numel()).copy_(values)
        if self.engine.zero and dist.get_world_size(group) > 1:
            dist.all_reduce(local, group=group)
        return local.cpu()

    def _stores(self, entry: Entry) -> bool:
        groups, role = self.engine.groups, entry.role
        topology, rank = groups.topology, groups.rank
        if role.tied_copy:
            return False
        replica = dist.get_rank(groups.expert_data) if role.expert else topology.data_rank(rank)
        return replica == 0 and (role.differs_over_tensor(topology) or topology.tensor_rank(rank) == 0)


def _values(owned: Slice, part: str) -> Tensor:
    return owned.master if part == "master" else owned.moments[part]
