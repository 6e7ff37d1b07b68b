"""Which layouts a run could have on so many ranks: what its file leaves open, as far as it divides.

`RunConfig.check_layout` has the last word on what is legal; the arithmetic here only keeps its refusals rare.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ..parallel.config import ParallelConfig
from ..parallel.topology import Topology
from ..training.config import RunConfig

# Chunks of a stage beyond which messages cost more than the bubble that is left: 1/8 of it.
_MOST_CHUNKS = 8


@dataclass(frozen=True)
class Option:
    """What can be chosen of a run. ``micro_batch`` None: all of a rank's share at once."""

    parallel: ParallelConfig
    micro_batch: int | None
    recompute: bool

    def applied_to(self, config: RunConfig) -> RunConfig:
        """``config`` laid out so."""
        training = {"micro_batch": self.micro_batch, "recompute": "full" if self.recompute else "none"}
        return config.model_copy(
            update={"parallel": self.parallel, "training": config.training.model_copy(update=training)}
        )


def open_keys(config: RunConfig) -> list[str]:
    """Dotted keys that the run's files say nothing of, so that they may be chosen."""
    parallel = [key for key in ("tensor", "pipeline", "virtual_stages", "expert") if _open(config, key)]
    training = config.training
    return [
        *(f"parallel.{key}" for key in parallel),
        *(["training.micro_batch"] if training.micro_batch is None else []),
        *(["training.recompute"] if "recompute" not in training.model_fields_set else []),
    ]


def smallest_world(parallel: ParallelConfig) -> int:
    """Ranks that a layout needs at least."""
    spread = 1 if parallel.expert_over == "dp" else parallel.tensor
    data = parallel.expert // math.gcd(parallel.expert, spread)
    return parallel.tensor * parallel.pipeline * data


def options(config: RunConfig, world: int, node_ranks: int) -> Iterator[list[Option]]:
    """Options that differ in recomputation and micro-batch alone, those that need more memory first."""
    model, moe, given = config.model, config.moe, config.parallel
    tensors = [t for t in _divisors(node_ranks) if not any(size % t for size in _cut(config))]
    for tensor in tensors if _open(config, "tensor") else [given.tensor]:
        if moe is not None and tensor > 1 and not (given.sequence or given.expert_over == "dp"):
            continue
        for pipeline in _divisors(model.layers) if _open(config, "pipeline") else [given.pipeline]:
            if world % (tensor * pipeline) or model.layers % pipeline:
                continue
            data = world // (tensor * pipeline)
            for chunks in _chunks(config, pipeline):
                if config.training.batch % (data * (pipeline if chunks > 1 else 1)):
                    continue
                for expert in _experts(config, data, tensor):
                    sizes = {"tensor": tensor, "pipeline": pipeline, "virtual_stages": chunks, "expert": expert}
                    yield _memory_options(config, given.model_copy(update=sizes), world)


def _memory_options(config: RunConfig, parallel: ParallelConfig, world: int) -> list[Option]:
    topology = Topology.build(parallel, world)
    share = config.training.batch // topology.data
    micro = config.training.micro_batch
    sizes: list[int | None] = [micro]
    if micro is None:
        whole = share // topology.rounds
        sizes += [n for n in (32, 16, 8, 4, 2, 1) if n < whole and share % (n * topology.rounds) == 0]
    fixed = config.training.recompute == "full"
    again = [False, True] if "training.recompute" in open_keys(config) else [fixed]
    return [Option(parallel, size, recompute) for recompute in again for size in sizes]


def _open(config: RunConfig, key: str) -> bool:
    return key not in config.parallel.model_fields_set


def _cut(config: RunConfig) -> tuple[int, ...]:
    """What tensor ranks share out."""
    model = config.model
    return (model.heads, model.kv_heads, model.ffn, model.vocab_multiple, config.training.seq)


def _chunks(config: RunConfig, pipeline: int) -> list[int]:
    if not _open(config, "virtual_stages"):
        return [config.parallel.virtual_stages] if pipeline > 1 or config.parallel.virtual_stages == 1 else []
    per_stage = config.model.layers // pipeline
    return [n for n in _divisors(per_stage) if n <= _MOST_CHUNKS] if pipeline > 1 else [1]


def _experts(config: RunConfig, data: int, tensor: int) -> list[int]:
    """Expert-parallel sizes, the smallest first."""
    ranks = data if config.parallel.expert_over == "dp" else data * tensor
    if not _open(config, "expert"):
        return [config.parallel.expert] if ranks % config.parallel.expert == 0 else []
    experts = 1 if config.moe is None else config.moe.experts
    return [n for n in _divisors(experts) if ranks % n == 0]


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
