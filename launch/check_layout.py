"""``study plan --check-layout``: builds ranks of a world of any size without its memory or its machines.

Of every pipeline stage the first and the last rank are built for real on torch's meta device, in a world whose messages
go nowhere: Megatron's and DeepSpeed's groups checked against the topology, every parameter with its shape. A stage's
ranks differ in their coordinates alone, so the logical names of all of them follow from the built one's shapes, and
show whether the model is held whole.
"""

import math
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..compat.cuda_standin import install
from ..models.config import ModelConfig
from ..models.cost.memory import Workload, activation_bytes, state_bytes
from ..models.counts import HeldParameters, count_held, count_parameters
from ..moe.config import MoEConfig
from ..parallel.topology import Topology
from ..training.budget import workload
from ..training.config import RunConfig
from .ownership import Box, Holding, group_faults, replica_faults, tiling_faults

# Faults that are told one by one.
_SHOWN = 20


@dataclass(frozen=True)
class Layout:
    """All that decides which rank holds what, and how much memory that takes."""

    model: ModelConfig
    moe: MoEConfig | None
    vocab: int
    work: Workload
    topology: Topology

    @classmethod
    def of(cls, config: RunConfig, vocab: int, topology: Topology) -> "Layout":
        # The budget decides how long a run takes, not what its ranks hold.
        work = replace(workload(config, vocab, topology), steps=1, batch_tokens=0)
        return cls(config.model, config.moe, vocab, work, topology)


@dataclass(frozen=True)
class LayoutCheck:
    """What building ranks of a layout showed.

    Attributes:
        runs: that have this layout and this model.
        layout: sizes of the topology.
        ranks_built: for real, of ``layout["world"]``.
        tensors: logical tensors; ``parameters`` are their elements.
        fullest_rank: it holds ``parameters_held`` parameters and needs ``memory_bytes`` for state and activations.
        seconds: that the check took.
        faults: what is wrong; empty if every parameter is held, reduced and counted once.
    """

    runs: tuple[str, ...]
    layout: dict[str, Any]
    ranks_built: int
    tensors: int
    parameters: int
    fullest_rank: int
    parameters_held: int
    memory_bytes: int
    seconds: float
    faults: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def check_layouts(runs: Iterable[tuple[RunConfig, int, Topology]]) -> list[LayoutCheck]:
    """Check the layouts of runs, given as (configuration, vocabulary, topology), each distinct one once.

    Raises:
        RuntimeError: Megatron or DeepSpeed placed a rank elsewhere than the topology says.
    """
    names: dict[Layout, list[str]] = defaultdict(list)
    for config, vocab, topology in runs:
        names[Layout.of(config, vocab, topology)].append(config.name)
    return [check_layout(layout, found) for layout, found in names.items()]


def check_layout(layout: Layout, runs: Sequence[str]) -> LayoutCheck:
    """Build ranks of ``layout`` and follow every parameter to all ranks that hold it."""
    began = time.perf_counter()
    install()
    topology = layout.topology
    faults = group_faults(topology)
    holdings: list[Holding] = []
    memory: dict[int, tuple[int, HeldParameters]] = {}
    built: set[int] = set()
    for stage in range(topology.pipeline):
        first = stage * topology.stage_ranks
        ends = sorted({first, first + topology.stage_ranks - 1})
        built.update(ends)
        held, found = _build(layout, ends[0])
        if len(ends) > 1 and _build(layout, ends[1]) != (held, found):
            faults.append(f"ranks {ends[0]} and {ends[1]} of one pipeline stage were built differently")
        counted = count_held(layout.model, layout.moe, layout.vocab, topology, stage)
        if held != counted:
            faults.append(
                f"rank {first} holds {held.dense} dense and {held.expert} expert parameters, and the plan counts "
                f"{counted.dense} and {counted.expert}"
            )
        holdings += found
        memory[first] = (_memory(layout, held, stage), held)
    boxes = dict.fromkeys(holding.box for holding in holdings)
    faults += tiling_faults(boxes) + replica_faults(holdings, topology)
    parameters = sum(math.prod(shape) for shape in {box.name: box.shape for box in boxes}.values())
    counted_all = count_parameters(layout.model, layout.moe, layout.vocab).all
    if parameters != counted_all:
        faults.append(f"the ranks hold a model of {parameters} parameters, and the plan counts {counted_all}")
    fullest = max(memory, key=lambda rank: memory[rank][0])
    return LayoutCheck(
        runs=tuple(runs),
        layout=topology.describe(),
        ranks_built=len(built),
        tensors=len({box.name for box in boxes}),
        parameters=parameters,
        fullest_rank=fullest,
        parameters_held=memory[fullest][1].all,
        memory_bytes=memory[fullest][0],
        seconds=time.perf_counter() - began,
        faults=(*faults[:_SHOWN], *([f"and {len(faults) - _SHOWN} more"] if len(faults) > _SHOWN else [])),
    )


def _build(layout: Layout, rank: int) -> tuple[HeldParameters, list[Holding]]:
    """What ``rank`` holds, built for real, and from its shapes what every rank of its pipeline stage holds."""
    from ..models.build import build_stage
    from ..models.names import NameMap
    from ..parallel.fake_world import fake_world
    from ..parallel.groups import Groups

    topology, model, moe = layout.topology, layout.model, layout.moe
    with fake_world(rank, topology.world):
        groups = Groups.build(topology)
        work = layout.work
        stage = build_stage(
            model, moe, vocab=layout.vocab, seq=work.seq, dtype=work.dtype, groups=groups, device="meta"
        )
        own = NameMap(model, moe, groups).entries(stage).values()
        expert = sum(entry.parameter.numel() for entry in own if entry.role.expert)
        held = HeldParameters(sum(entry.parameter.numel() for entry in own) - expert, expert)
        holdings = [
            Holding(
                Box(piece.name, piece.shape, piece.start, piece.extent),
                entry.role.expert,
                entry.role.norm_weight(topology, zero=1),
                ranks,
            )
            for ranks in _alike(topology, topology.pipeline_rank(rank))
            for entry in NameMap(model, moe, replace(groups, rank=ranks[0])).entries(stage).values()
            for piece in entry.pieces
        ]
        groups.destroy()
    return held, holdings


def _alike(topology: Topology, stage: int) -> list[tuple[int, ...]]:
    """Ranks of a pipeline stage, those with equal tensor and expert coordinates together."""
    places: dict[tuple[int, int], list[int]] = defaultdict(list)
    for rank in range(stage * topology.stage_ranks, (stage + 1) * topology.stage_ranks):
        places[topology.tensor_rank(rank), topology.expert_rank(rank)].append(rank)
    return [tuple(ranks) for ranks in places.values()]


def _memory(layout: Layout, held: HeldParameters, stage: int) -> int:
    activations = activation_bytes(layout.model, layout.moe, layout.vocab, layout.work, layout.topology, stage)
    return state_bytes(held, layout.work, layout.topology) + activations
