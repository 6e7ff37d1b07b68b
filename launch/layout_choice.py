"""The fastest layout of a run on a cluster, by the cost model, and what bounds it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..base.errors import UserError
from ..base.progress import memory
from ..models.cost.hardware import Hardware
from ..models.cost.step import StepModel, StepTime
from ..parallel.topology import Topology
from ..training.budget import workload_of_step
from ..training.config import RunConfig
from .cluster_config import ClusterConfig
from .cluster_fit import cores_of_rank, node_room, nodes_of, rank_room, ranks_on_node
from .layout_options import Option, open_keys, options, smallest_world

# Where nothing fits, clusters of up to so many nodes are tried to say which would do.
_MOST_NODES = 8192


@dataclass(frozen=True)
class Choice:
    """A layout and what the cost model says of it.

    Attributes:
        step: seconds of an optimizer step, by what they go into.
        flops_share: model FLOPs over the devices' peak (MFU).
        chosen: dotted keys that were left open, and their values.
        runner_up: the next best layout of other sizes; ``slower`` is how much longer its step takes, 0.1: a tenth.
    """

    option: Option
    world: int
    node_ranks: int
    memory_bytes: int
    step: StepTime
    flops_share: float
    chosen: dict[str, Any]
    runner_up: str = ""
    slower: float = 0.0


@dataclass(frozen=True)
class _Found:
    option: Option
    topology: Topology
    memory_bytes: int
    step: StepTime


class LayoutChooser:
    """Chooses for the runs of a study; runs that differ in budget, seed or learning rate alone share a search.

    Raises:
        UserError: the cluster file does not tell its hardware.
    """

    def __init__(self, cluster: ClusterConfig):
        if cluster.hardware is None:
            raise UserError(
                f"cluster {cluster.name} has no hardware section, so nobody knows how fast it is; add one, or extend "
                "clusters/h100.yaml, a100.yaml, cpu.yaml"
            )
        self._cluster = cluster
        self._hardware = cluster.hardware
        self._known: dict[object, Choice | str] = {}

    def choose(self, config: RunConfig, vocab: int, world: int | None) -> Choice:
        """The fastest layout on ``world`` ranks; without a world that of the fewest device-hours.

        Raises:
            UserError: no layout is legal and fits; says what the run would need.
        """
        key = _alike(config, vocab, world)
        if key not in self._known:
            try:
                self._known[key] = self._search(config, vocab, world)
            except UserError as error:
                self._known[key] = str(error).removeprefix(f"{config.name}: ")
        found = self._known[key]
        if isinstance(found, str):
            raise UserError(f"{config.name}: {found}")
        return found

    def _search(self, config: RunConfig, vocab: int, world: int | None) -> Choice:
        room = node_room(self._cluster, config.runtime.threads, config.name)
        if world is not None:
            nodes_of(world, ranks_on_node(world, room), self._cluster, config.name)
        model = StepModel(config.model, config.moe, vocab, self._of_rank(config.runtime.threads))
        best: tuple[float, list[_Found]] | None = None
        for ranks in [world] if world is not None else _worlds(config, room, self._cluster.max_nodes):
            found = self._on(model, config, ranks, room)
            cost = ranks * found[0].step.seconds if found else float("inf")
            if best is not None and cost >= best[0]:
                break  # more ranks cost more from where on everything fits
            if found:
                best = (cost, found)
        if best is None:
            raise self._refusal(model, config, world, room)
        return _choice(config, model, best[1])

    def _of_rank(self, threads: int | None) -> Hardware:
        """A rank's hardware: a device, or as many cores as it has threads, which share one core's bandwidths."""
        cores = 1 if self._cluster.node.devices else cores_of_rank(self._cluster, threads)
        peaks = {key: getattr(self._hardware, key) * cores for key in ("bf16_tflops", "fp32_tflops")}
        return self._hardware.model_copy(update=peaks)

    def _on(self, model: StepModel, config: RunConfig, world: int, room: int) -> list[_Found]:
        """Legal layouts that fit, the fastest first. Of those with equal sizes one micro-batch is kept."""
        node_ranks = ranks_on_node(world, room)
        limit = rank_room(self._cluster, node_ranks)
        found = []
        for alike in options(config, world, node_ranks):
            if not _is_legal(alike[-1], config, world):
                continue
            topology = Topology.build(alike[0].parallel, world, node_ranks)
            timed = list(_timed(model, alike, config, topology, limit))
            if timed:
                found.append(min(timed, key=lambda one: one.step.seconds))
        return sorted(found, key=lambda one: one.step.seconds)

    def _refusal(self, model: StepModel, config: RunConfig, world: int | None, room: int) -> UserError:
        """Nothing is legal and fits: what is in the way, and how many nodes would do."""
        cluster, most = self._cluster, self._cluster.max_nodes
        tried = [world] if world is not None else _worlds(config, room, most)
        needed = [size for ranks in tried if (size := self._leanest(model, config, ranks, room)) is not None]
        asked = f"{world} ranks" if world is not None else f"up to {most} nodes of {room} ranks"
        if not needed and world is not None:
            config.check_layout(world)  # it says what is not legal
        limit = memory(rank_room(cluster, ranks_on_node(world or room, room)))
        missing = (
            f"the leanest needs {memory(min(needed))} a rank and {limit} may be filled" if needed else "none is legal"
        )
        larger = (ranks for ranks in _worlds(config, room, _MOST_NODES) if ranks > max(tried))
        smallest = next((ranks for ranks in larger if self._on(model, config, ranks, room)), None)
        if smallest is None:
            would = f"nor does any on up to {_MOST_NODES} nodes; {_advice(config)}"
        else:
            nodes = -(-smallest // room)
            would = f"the smallest cluster that would do has {nodes} node{'s' if nodes > 1 else ''} ({smallest} ranks)"
        return UserError(f"{config.name}: no layout on {asked} of cluster {cluster.name} fits: {missing}; {would}")

    def _leanest(self, model: StepModel, config: RunConfig, world: int, room: int) -> int | None:
        """Bytes a rank that legal layouts need at least; None where none is legal."""
        sizes = []
        for alike in options(config, world, ranks_on_node(world, room)):
            if _is_legal(alike[-1], config, world):
                laid_out = alike[-1].applied_to(config)
                topology = Topology.build(laid_out.parallel, world)
                sizes.append(model.memory(workload_of_step(laid_out, topology), topology))
        return min(sizes, default=None)


def _timed(
    model: StepModel, alike: list[Option], config: RunConfig, topology: Topology, limit: float
) -> Iterator[_Found]:
    """Those that fit ``limit`` bytes a rank. Where one fits without recomputation, none is computed again."""
    fits = False
    for option in alike:
        if option.recompute and fits:
            return
        work = workload_of_step(option.applied_to(config), topology)
        needed = model.memory(work, topology)
        if needed <= limit:
            fits = True
            yield _Found(option, topology, needed, model.time(work, topology))


def _choice(config: RunConfig, model: StepModel, found: list[_Found]) -> Choice:
    best, others = found[0], found[1:]
    topology = best.topology
    laid_out = best.option.applied_to(config)
    work = workload_of_step(laid_out, topology)
    chosen: dict[str, Any] = {}
    for key in open_keys(config):
        section, field = key.split(".")
        chosen[key] = getattr(getattr(laid_out, section), field)
    return Choice(
        option=best.option,
        world=topology.world,
        node_ranks=topology.node_ranks,
        memory_bytes=best.memory_bytes,
        step=best.step,
        flops_share=model.flops_share(work, topology, best.step.seconds),
        chosen=chosen,
        runner_up=sizes_of(others[0].topology) if others else "",
        slower=others[0].step.seconds / best.step.seconds - 1 if others else 0.0,
    )


def sizes_of(topology: Topology) -> str:
    """A layout in short: TP4 PP8 VP5 EP8 DP16, without what is 1."""
    sizes = {
        "TP": topology.tensor, "PP": topology.pipeline, "VP": topology.virtual_stages, "EP": topology.expert,
        "DP": topology.data,
    }  # fmt: skip
    return " ".join(f"{name}{size}" for name, size in sizes.items() if size > 1) or "1 rank"


def _is_legal(option: Option, config: RunConfig, world: int) -> bool:
    try:
        option.applied_to(config).check_layout(world)
    except UserError:
        return False
    return True


def _worlds(config: RunConfig, room: int, nodes: int) -> list[int]:
    """Numbers of ranks to try on ``nodes`` nodes of ``room`` ranks.

    Powers of two within a node, the whole of it, powers of two of nodes, all of them; and as many times the ranks that
    the run's own keys need.
    """
    inside = {2**power for power in range(room.bit_length())} | {room}
    across = {room * 2**power for power in range(nodes.bit_length())} | {room * nodes}
    least = smallest_world(config.parallel)
    worlds = {ranks * times for ranks in inside | across for times in (1, least)}
    return sorted(ranks for ranks in worlds if ranks // ranks_on_node(ranks, room) <= nodes)


def _alike(config: RunConfig, vocab: int, world: int | None) -> tuple[object, ...]:
    """Equal for runs with equal choices: what neither budget, seed, learning rate nor text changes."""
    training = config.training
    return (
        config.model.model_dump_json(),
        config.moe.model_dump_json() if config.moe else None,
        config.parallel.model_dump_json(),
        tuple(open_keys(config)),
        (training.seq, training.batch, training.micro_batch, training.dtype, training.recompute),
        (config.noise.every > 0, config.small_batch if config.noise.every else 0, config.optimizer.impl == "sgd"),
        (config.runtime.threads, vocab, world),
    )


def _advice(config: RunConfig) -> str:
    fixed = [f"parallel.{key}" for key in sorted(config.parallel.model_fields_set)]
    return f"leave {', '.join(fixed)} out, so that they can be chosen" if fixed else "lower training.seq or the model"
