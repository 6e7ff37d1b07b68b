"""What a run asks of the cluster, and runs of one shape as arrays: one job of Slurm, one element a run."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ...base.errors import UserError
from ...base.progress import memory
from ...training.config import RunConfig
from ..cluster_config import ClusterConfig
from ..cluster_fit import GIB, cores_of_rank, host_bytes, node_room, nodes_of, ranks_on_node
from ..planned import PlannedRun, PlanRow

_SHOWN = 20  # complaints


@dataclass(frozen=True, order=True)
class Shape:
    """Resources of a run.

    Attributes:
        ranks: on each node.
        cores: of each rank.
        memory_mb: MiB on each node.
        devices: on each node.
        minutes: until Slurm ends the job.
    """

    nodes: int
    ranks: int
    cores: int
    memory_mb: int
    devices: int
    minutes: int

    @property
    def world(self) -> int:
        return self.nodes * self.ranks


@dataclass(frozen=True)
class Batch:
    """Runs of one shape, submitted as one array; element i is ``runs[i]``. They start when batches ``after`` ended."""

    name: str
    shape: Shape
    runs: tuple[str, ...]
    after: tuple[str, ...] = ()


def shape_of(config: RunConfig, row: PlanRow, cluster: ClusterConfig, least_mb: int = 0) -> Shape:
    """What a planned run asks for.

    Args:
        least_mb: MiB on each node to ask for at least, as far as a node has them.

    Raises:
        UserError: the run does not fit the cluster's nodes; says by how much, and what to change.
    """
    node, world, threads = cluster.node, row.layout["world"], config.runtime.threads
    cores = cores_of_rank(cluster, threads)
    ranks = ranks_on_node(world, node_room(cluster, threads, row.name))  # torchrun starts as many on each node
    return Shape(
        nodes=nodes_of(world, ranks, cluster, row.name),
        ranks=ranks,
        cores=max(cores, 1),
        memory_mb=min(max(_memory_mb(row, ranks, cluster), least_mb), _whole_mb(cluster)),
        devices=ranks if node.devices else 0,
        minutes=math.ceil(cluster.seconds / 60),
    )


def _whole_mb(cluster: ClusterConfig) -> int:
    return int(cluster.node.memory_gb * 1024)


def _memory_mb(row: PlanRow, ranks: int, cluster: ClusterConfig) -> int:
    """Host memory of the ranks on a node: their share of a node with devices, else what the plan expects of them."""
    node, whole = cluster.node, _whole_mb(cluster)
    if node.device_memory_gb is not None:
        if row.memory_bytes > node.device_memory_gb * GIB:
            raise UserError(
                f"{row.name}: a rank needs about {memory(row.memory_bytes)} and node.device_memory_gb of cluster "
                f"{cluster.name} is {node.device_memory_gb:g}; raise parallel.tensor, pipeline or expert, or lower "
                "training.micro_batch"
            )
        return whole * ranks // node.devices
    expected = host_bytes(row.memory_bytes, ranks)
    if expected > whole << 20:
        raise UserError(
            f"{row.name}: {ranks} ranks on a node need about {memory(expected)} and node.memory_gb of cluster "
            f"{cluster.name} is {node.memory_gb:g}; lower training.micro_batch, or spread the run with --world"
        )
    steps = 2 ** math.ceil(math.log2(expected / GIB))  # few sizes, so that runs share arrays
    return steps * 1024


def batches_of(
    runs: Iterable[PlannedRun], rows: Sequence[PlanRow], cluster: ClusterConfig, least_mb: Mapping[str, int]
) -> list[Batch]:
    """``runs`` as arrays by shape, trunks before their branches.

    Args:
        least_mb: by name, for runs that ran out of memory before.

    Raises:
        UserError: runs do not fit the cluster; names them all, each with its reason.
    """
    planned, chosen = {row.name: row for row in rows}, list(runs)
    names = {run.name for run in chosen}
    waves: tuple[dict[Shape, list[str]], dict[Shape, list[str]]] = ({}, {})
    complaints = []
    for run in chosen:
        try:
            shape = shape_of(run.config, planned[run.name], cluster, least_mb.get(run.name, 0))
        except UserError as error:
            complaints.append(str(error))
            continue
        waves[run.trunk in names].setdefault(shape, []).append(run.name)
    if complaints:
        more = [f"and {len(complaints) - _SHOWN} more runs"] if len(complaints) > _SHOWN else []
        raise UserError("\n".join(complaints[:_SHOWN] + more))
    trunks = _arrays("runs", waves[0], cluster.array_limit, ())
    branches = _arrays("branches", waves[1], cluster.array_limit, tuple(batch.name for batch in trunks))
    return trunks + branches


def _arrays(label: str, shapes: dict[Shape, list[str]], limit: int, after: tuple[str, ...]) -> list[Batch]:
    """Largest first, since they take longest to find room."""
    parts = [
        (shape, names[first : first + limit])
        for shape, names in sorted(shapes.items(), reverse=True)
        for first in range(0, len(names), limit)
    ]
    return [Batch(f"{label}-{number}", shape, tuple(part), after) for number, (shape, part) in enumerate(parts, 1)]
