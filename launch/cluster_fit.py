"""How many ranks a node of a cluster takes, and how much memory each of them has."""

from ..base.errors import UserError
from .cluster_config import ClusterConfig

GIB = 1 << 30
# What imports of torch, DeepSpeed and Megatron leave in a process: 0.6 to 0.8 GB on CPU.
_IMPORTED = GIB
# The plan counts tensors; allocators and libraries need room beside them.
_HOST_MARGIN = 1.5
# What chosen layouts fill of a device's memory at most: NCCL's buffers, CUDA's context and fragmentation need some.
_DEVICE_FILLED = 0.9


def cores_of_rank(cluster: ClusterConfig, threads: int | None) -> int:
    """Cores that a rank takes: its share of a node with devices, else ``runtime.threads``."""
    node = cluster.node
    return node.cores // node.devices if node.devices else threads or 1


def node_room(cluster: ClusterConfig, threads: int | None, name: str) -> int:
    """Most ranks on a node.

    Raises:
        UserError: run ``name`` wants more threads than a node has cores.
    """
    cores = cores_of_rank(cluster, threads)
    room = cluster.node.devices or cluster.node.cores // cores
    if room == 0:
        raise UserError(
            f"{name}: runtime.threads ({cores}) exceeds node.cores ({cluster.node.cores}) of cluster {cluster.name}"
        )
    return room


def ranks_on_node(world: int, room: int) -> int:
    """Ranks on each node: as many as there is room for, the same number on every one."""
    return next(n for n in range(min(world, room), 0, -1) if world % n == 0)


def nodes_of(world: int, ranks: int, cluster: ClusterConfig, name: str) -> int:
    """Nodes of ``world`` ranks, ``ranks`` on each.

    Raises:
        UserError: run ``name`` may not have so many.
    """
    nodes = world // ranks
    if nodes > cluster.max_nodes:
        raise UserError(
            f"{name}: {world} ranks, {ranks} a node, need {nodes} nodes and max_nodes of cluster {cluster.name} is "
            f"{cluster.max_nodes}; raise it, or give the run fewer ranks"
        )
    return nodes


def host_bytes(rank_bytes: int, ranks: int) -> float:
    """Host memory that ``ranks`` ranks without devices take, of which the plan counts ``rank_bytes`` each."""
    return ranks * (rank_bytes * _HOST_MARGIN + _IMPORTED)


def rank_room(cluster: ClusterConfig, ranks: int) -> float:
    """Bytes that the plan may count of each of ``ranks`` ranks on a node, at most."""
    node = cluster.node
    if node.device_memory_gb is not None:
        return node.device_memory_gb * GIB * _DEVICE_FILLED
    return (node.memory_gb * GIB / ranks - _IMPORTED) / _HOST_MARGIN
