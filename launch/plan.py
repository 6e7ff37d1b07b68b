"""What runs will cost, before anything starts."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import psutil
from rich.table import Table

from .. import data
from ..base.errors import UserError
from ..base.progress import duration, memory, short
from ..models.counts import count_parameters, flops_per_token
from ..training.budget import cost_of, steps_of, tokens_per_step
from ..training.config import RunConfig
from ..training.schedule import check_schedule
from .environment import cores

# Below so many steps a run is mostly warm-up, and its loss says little about its budget.
FEW_STEPS = 50
# What a forked run holds for itself of the libraries that it shares with its parent.
PROCESS_BYTES = 200 << 20


@dataclass(frozen=True)
class PlanRow:
    """One run. Tokens and FLOPs are those of whole steps.

    ``memory_bytes`` (on top of what imports take) and ``seconds`` are estimates.
    """

    name: str
    family: str
    config_hash: str
    n_total: int
    n_active: int
    tokens: int
    flops: float
    steps: int
    layout: dict[str, int]
    memory_bytes: int
    seconds: float


@dataclass(frozen=True)
class Plan:
    """Runs with their cost; ``workers`` of them at a time."""

    rows: tuple[PlanRow, ...]
    workers: int
    warnings: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """Wall time if the workers are kept busy."""
        longest = max((row.seconds for row in self.rows), default=0.0)
        return max(sum(row.seconds for row in self.rows) / self.workers, longest)

    @property
    def memory_bytes(self) -> int:
        """The largest runs side by side."""
        return sum(sorted((row.memory_bytes for row in self.rows), reverse=True)[: self.workers])

    def as_json(self) -> dict[str, Any]:
        totals = {
            "runs": len(self.rows),
            "tokens": sum(row.tokens for row in self.rows),
            "flops": sum(row.flops for row in self.rows),
            "workers": self.workers,
            "memory_bytes": self.memory_bytes,
            "seconds": self.seconds,
        }
        return {"runs": [asdict(row) for row in self.rows], "totals": totals, "warnings": list(self.warnings)}


def plan_runs(runs: Sequence[tuple[str, RunConfig]], workers: int | None = None, world: int = 1) -> Plan:
    """Plan runs given as (family, configuration), ``world`` ranks each.

    ``workers`` None: as many as cores and available memory carry.

    Raises:
        UserError: runs that cannot start: a budget below one batch, a layout that does not fit. Names them all.
    """
    vocabularies = _Vocabularies()
    rows, problems = [], []
    for family, config in runs:
        try:
            rows.append(_row(family, config, vocabularies.of(config.data), world))
        except UserError as error:
            problems.append(f"{config.name}: {error}")
    if problems:
        more = [f"and {len(problems) - 20} more runs"] if len(problems) > 20 else []
        raise UserError("\n".join([*problems[:20], *more]))
    workers = workers if workers is not None else _workers(rows)
    plan = Plan(tuple(rows), workers, ())
    return replace(plan, warnings=tuple(_warnings(plan)))


class _Vocabularies:
    """Vocabulary sizes by data section; a study has few of those and many runs."""

    def __init__(self) -> None:
        self._known: dict[str, int] = {}

    def of(self, config: data.DataConfig) -> int:
        key = config.model_dump_json()
        if key not in self._known:
            self._known[key] = data.vocabulary_size(config)
        return self._known[key]


def _row(family: str, config: RunConfig, vocab: int, world: int) -> PlanRow:
    topology = config.check_layout(world)
    steps = steps_of(config, vocab)
    check_schedule(config, steps)
    tokens = steps * tokens_per_step(config)
    counts = count_parameters(config.model, config.moe, vocab)
    flops = flops_per_token(config.model, config.moe, vocab, config.training.seq)
    cost = cost_of(config, vocab, topology)
    return PlanRow(
        name=config.name,
        family=family,
        config_hash=config.config_hash,
        n_total=counts.total,
        n_active=counts.active,
        tokens=tokens,
        flops=float(flops.total * tokens),
        steps=steps,
        layout=topology.describe(),
        memory_bytes=cost.memory_bytes,
        seconds=cost.seconds,
    )


def _workers(rows: Sequence[PlanRow]) -> int:
    largest = max((row.memory_bytes for row in rows), default=0)
    fitting = psutil.virtual_memory().available // (largest + PROCESS_BYTES)
    return max(min(cores(), fitting, len(rows)), 1)


def _warnings(plan: Plan) -> list[str]:
    warnings = []
    few = [f"{row.name} ({row.steps})" for row in plan.rows if row.steps < FEW_STEPS]
    if few:
        warnings.append(
            f"{len(few)} runs have fewer than {FEW_STEPS} steps: {_some(few)}; give them a larger budget or a smaller "
            "training.batch"
        )
    available = psutil.virtual_memory().available
    if plan.memory_bytes > available:
        warnings.append(
            f"{plan.workers} runs side by side need about {memory(plan.memory_bytes)} and {memory(available)} are "
            "available; lower workers"
        )
    return warnings


def repeated_text(plan: Plan, configs: Iterable[RunConfig], unique_tokens: Mapping[str, int]) -> list[str]:
    """A warning if runs see their training text more than once.

    Args:
        unique_tokens: by data section, as the JSON that pydantic dumps.
    """
    found = []
    for row, config in zip(plan.rows, configs, strict=True):
        epochs = row.tokens / unique_tokens[config.data.model_dump_json()]
        if epochs > 1:
            found.append(f"{row.name} ({epochs:.1f} times)")
    return [f"{len(found)} runs see their training text more than once: {_some(found)}"] if found else []


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def render(plan: Plan) -> Table:
    """The plan as a table for a terminal."""
    total = (
        f"{len(plan.rows)} runs, {plan.workers} at a time: about {duration(plan.seconds)}, {memory(plan.memory_bytes)}"
    )
    table = Table(caption=total, caption_justify="left")
    for heading in ("run", "family"):
        table.add_column(heading, no_wrap=True)
    for heading in ("N total", "N active", "tokens", "steps", "FLOPs", "ranks", "memory", "time"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in plan.rows:
        table.add_row(
            row.name,
            row.family,
            short(row.n_total),
            short(row.n_active),
            short(row.tokens),
            str(row.steps),
            f"{row.flops:.3g}",
            str(row.layout["world"]),
            memory(row.memory_bytes),
            duration(row.seconds),
        )
    return table
