"""What a study file amounts to: runs, combinations that no run can be made of, and what the runs will cost."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..training.config import RunConfig
from .layout_choice import Choice


@dataclass(frozen=True)
class PlannedRun:
    """One run of a study. ``config.name`` equals ``name``, which is also the name of the run's folder.

    ``choice`` is the layout that was chosen for a cluster, which ``config`` then has.

    ``check`` is empty, or ``lr`` for a run that only shows how good the learning-rate rule is. ``trunk`` names the run
    that this one branches from, if any.
    """

    name: str
    family: str
    groups: tuple[str, ...]
    config: RunConfig
    check: str = ""
    trunk: str = ""
    choice: Choice | None = None


@dataclass(frozen=True)
class ImpossibleRun:
    """A combination that cannot be run, and each complaint about it."""

    name: str
    family: str
    groups: tuple[str, ...]
    complaints: tuple[str, ...]

    @property
    def reason(self) -> str:
        return "; ".join(self.complaints)


@dataclass(frozen=True)
class Expansion:
    """Everything a study asks for, by name; ``warnings`` are about what it asks for and does not get."""

    runs: tuple[PlannedRun, ...]
    impossible: tuple[ImpossibleRun, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def everything(self) -> list[PlannedRun | ImpossibleRun]:
        """What has a folder in the study, by name."""
        return sorted([*self.runs, *self.impossible], key=lambda run: run.name)


@dataclass(frozen=True)
class Speed:
    """How fast a run is expected to be on a cluster.

    Attributes:
        device_hours: devices (cores, where there are none) times hours.
        mfu: model FLOPs over the devices' peak.
        bound: what takes most of a step; ``shares`` has all of it.
        chosen: dotted keys that were left open, and what was chosen.
        runner_up: the next best sizes, whose step is longer by ``runner_up_slower``, 0.1: a tenth.
    """

    device_hours: float
    step_seconds: float
    mfu: float
    bound: str
    shares: dict[str, float]
    chosen: dict[str, Any]
    runner_up: str
    runner_up_slower: float


@dataclass(frozen=True)
class PlanRow:
    """One run. Tokens and FLOPs are those of whole steps; ``speed`` is known on a cluster.

    They describe the model; ``own_steps`` is how many of its steps this run trains, fewer for a branch of ``trunk``.
    ``memory_bytes`` (on top of what imports take) and ``seconds`` of the own steps are estimates. ``check`` as in
    `PlannedRun`.
    """

    name: str
    family: str
    check: str
    trunk: str
    config_hash: str
    n_total: int
    n_active: int
    tokens: int
    flops: float
    steps: int
    own_steps: int
    layout: dict[str, int]
    memory_bytes: int
    seconds: float
    micro_batch: int
    recompute: bool
    speed: Speed | None = None

    @property
    def own_flops(self) -> float:
        """What the own steps cost."""
        return self.flops * self.own_steps / self.steps


@dataclass(frozen=True)
class Plan:
    """Runs with their cost; ``workers`` of them at a time. ``impossible`` ones are left out."""

    rows: tuple[PlanRow, ...]
    impossible: tuple[ImpossibleRun, ...]
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
        totals: dict[str, Any] = {
            "runs": len(self.rows),
            "tokens": sum(row.tokens * row.own_steps // row.steps for row in self.rows),
            "flops": sum(row.own_flops for row in self.rows),
            "workers": self.workers,
            "memory_bytes": self.memory_bytes,
            "seconds": self.seconds,
        }
        hours = [row.speed.device_hours for row in self.rows if row.speed is not None]
        if hours:
            totals["device_hours"] = sum(hours)
        return {
            "runs": [asdict(row) for row in self.rows],
            "impossible": [{"name": run.name, "reason": run.reason} for run in self.impossible],
            "totals": totals,
            "warnings": list(self.warnings),
        }

    def warning(self, more: Iterable[str]) -> "Plan":
        """This plan with more warnings."""
        return replace(self, warnings=(*self.warnings, *more))
