"""Whether a layout's ranks hold a model whole: every logical tensor once, each piece by the ranks that reduce it.

Arithmetic over boxes and rank numbers alone; check_layout.py says which rank holds what.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

from ..parallel.topology import Topology


@dataclass(frozen=True)
class Box:
    """A box of a logical tensor: the tensor's name and shape, first index and extent in each dimension."""

    name: str
    shape: tuple[int, ...]
    start: tuple[int, ...]
    extent: tuple[int, ...]

    def overlaps(self, other: "Box") -> bool:
        """Whether the two share an element; both are of one tensor."""
        pairs = zip(self.start, self.extent, other.start, other.extent, strict=True)
        return all(a < b + b_extent and b < a + a_extent for a, a_extent, b, b_extent in pairs)

    def inside(self) -> bool:
        """Whether the box lies in its tensor."""
        bounds = zip(self.start, self.extent, self.shape, strict=True)
        return all(start >= 0 and start + extent <= size for start, extent, size in bounds)

    def __str__(self) -> str:
        ranges = ", ".join(f"{a}:{a + n}" for a, n in zip(self.start, self.extent, strict=True))
        return f"{self.name}[{ranges}]"


@dataclass(frozen=True)
class Holding:
    """Ranks that hold a box in one and the same way.

    Attributes:
        expert: gradients are reduced over expert-data groups, otherwise over data groups.
        weight: of a squared gradient on each of the ranks' slices, as the norm counts it.
    """

    box: Box
    expert: bool
    weight: float
    ranks: tuple[int, ...]


def tiling_faults(boxes: Iterable[Box]) -> list[str]:
    """What is missing, doubled or out of bounds among distinct boxes that should make up whole tensors."""
    tensors: dict[str, list[Box]] = defaultdict(list)
    for box in boxes:
        tensors[box.name].append(box)
    faults = []
    for name, parts in tensors.items():
        shapes = {part.shape for part in parts}
        if len(shapes) > 1:
            faults.append(f"{name}: ranks disagree about its shape: {', '.join(map(str, sorted(shapes)))}")
            continue
        faults += [f"{part} lies outside {part.shape}" for part in parts if not part.inside()]
        faults += [f"{a} and {b} overlap" for a, b in combinations(parts, 2) if a.overlaps(b)]
        held, whole = sum(math.prod(part.extent) for part in parts), math.prod(parts[0].shape)
        if held < whole:
            faults.append(f"{name}: {whole - held} of {whole} elements are on no rank")
    return faults


def replica_faults(holdings: Iterable[Holding], topology: Topology) -> list[str]:
    """Boxes whose gradients are reduced with ranks that hold something else, or counted other than once.

    The ranks that hold a box must be whole reduction groups, and the norm's weights must sum to 1 over these groups:
    under ZeRO 1 each group holds one copy of the reduced gradient, in slices.
    """
    families = {False: _numbered(topology.data_groups()), True: _numbered(topology.expert_data_groups())}
    by_box: dict[tuple[Box, bool], list[Holding]] = defaultdict(list)
    for holding in holdings:
        by_box[holding.box, holding.expert].append(holding)
    faults = []
    verdicts: dict[tuple[bool, tuple[tuple[int, float], ...]], str] = {}
    for (box, expert), held in by_box.items():
        members = {rank: holding.weight for holding in held for rank in holding.ranks}
        key = (expert, tuple(sorted(members.items())))
        if key not in verdicts:  # most boxes lie on the same ranks as others
            verdicts[key] = _verdict(members, *families[expert])
        if verdicts[key]:
            faults.append(f"{box}: {verdicts[key]}")
    return faults


def group_faults(topology: Topology) -> list[str]:
    """Families of groups that leave ranks out, or take them twice."""
    families = {
        "tensor": topology.tensor_groups(),
        "data": topology.data_groups(),
        "pipeline": topology.pipeline_groups(),
        "stage": topology.stage_groups(),
        "expert": topology.expert_groups(),
        "expert-data": topology.expert_data_groups(),
    }
    everybody = list(range(topology.world))
    return [
        f"the {name} groups are no partition of the {topology.world} ranks"
        for name, groups in families.items()
        if sorted(rank for group in groups for rank in group) != everybody
    ]


def _numbered(groups: Sequence[list[int]]) -> tuple[Sequence[list[int]], dict[int, int]]:
    return groups, {rank: number for number, group in enumerate(groups) for rank in group}


def _verdict(members: dict[int, float], groups: Sequence[list[int]], number: dict[int, int]) -> str:
    """What is wrong with the ranks that hold a box, each with its weight; empty if nothing is."""
    found = sorted({number[rank] for rank in members})
    for index in found:
        outside = [rank for rank in groups[index] if rank not in members]
        if outside:
            return f"rank {outside[0]} reduces its gradient with {groups[index][:8]} and does not hold it"
    total = sum(members[groups[index][0]] for index in found)
    return "" if math.isclose(total, 1) else f"norms count its gradient {total:g} times"
