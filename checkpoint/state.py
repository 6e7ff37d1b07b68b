"""A run's state as named logical tensors, gathered from and scattered to whatever layout holds it.

Three parts for each parameter: ``master`` (fp32 weights), ``exp_avg`` and ``exp_avg_sq`` (Adam's moments). A rank
under ZeRO 1 holds flat ranges of its parameters; here each parameter's ranges are summed over its replicas into
whole local tensors, which the name map cuts into boxes of logical tensors.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ..models.names import Entry, Piece
from ..parallel.engine import Engine, Slice

PARTS = ("master", "exp_avg", "exp_avg_sq")


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
    """The bridge between an engine's slices and logical tensors."""

    def __init__(self, engine: Engine, entries: Mapping[str, Entry]):
        self.engine = engine
        self.entries = entries

    def boxes(self) -> Iterator[Box]:
        """Every box that this rank is the one to store; together the ranks store every element once.

        All ranks of the world must iterate together: each part is summed over replicas on the way.
        """
        slices = self._slices_by_parameter()
        for part in PARTS:
            for entry in self.entries.values():
                local = self._whole_local(entry, part, slices[id(entry.parameter)])
                if self._stores(entry):
                    for piece in entry.pieces:
                        yield Box(part, piece, piece.read(local))

    def load(self, reader: BoxReader) -> None:
        """Set masters, moments and model parameters from logical tensors."""
        self.engine.prepare_moments()
        slices = self._slices_by_parameter()
        for part in PARTS:
            for entry in self.entries.values():
                local = torch.empty(entry.parameter.shape, dtype=torch.float32)
                for piece in entry.pieces:
                    piece.write(local, reader.box(part, piece))
                for owned in slices[id(entry.parameter)]:
                    target = owned.master if part == "master" else owned.moments[part]
                    target.copy_(local.view(-1).narrow(0, owned.start, target.numel()))
        self.engine.publish_masters()

    def _slices_by_parameter(self) -> dict[int, list[Slice]]:
        by_parameter: dict[int, list[Slice]] = {id(e.parameter): [] for e in self.entries.values()}
        for owned in self.engine.slices():
            by_parameter[id(owned.parameter)].append(owned)
        return by_parameter

    def _whole_local(self, entry: Entry, part: str, slices: list[Slice]) -> Tensor:
        groups = self.engine.groups
        group = groups.expert_data if entry.role.expert else groups.data
        local = torch.zeros(entry.parameter.shape, dtype=torch.float32, device=entry.parameter.device)
        for owned in slices:
            source = owned.master if part == "master" else owned.moments.get(part)
            if source is not None:  # no moments before the first step: they are zero
                local.view(-1).narrow(0, owned.start, source.numel()).copy_(source)
        if self.engine.zero and dist.get_world_size(group) > 1:
            dist.all_reduce(local, group=group)
        return local.cpu()

    def _stores(self, entry: Entry) -> bool:
        groups, role = self.engine.groups, entry.role
        topology, rank = groups.topology, groups.rank
        if role.tied_copy:
            return False
        if role.expert:
            return dist.get_rank(groups.expert_data) == 0
        return topology.data_rank(rank) == 0 and (role.tensor_sharded or topology.tensor_rank(rank) == 0)
