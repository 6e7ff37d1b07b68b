"""What all benchmarks share: rows, the machine they hold for, and timing that treats all implementations alike."""

import importlib.metadata
import os
import platform
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from ..data.config import DataConfig
from .child import Child

OURS, FLOOR = "moescale", "floor"
_PACKAGES = ("moescale", "torch", "deepspeed", "megatron-core", "transformers")
_VECTOR_UNITS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")


@dataclass(frozen=True)
class Request:
    """What the user asked for; see `run.run`."""

    against: tuple[str, ...]
    cases: tuple[str, ...] | None
    threads: int | None
    allocators: Mapping[str, Mapping[str, str]]
    data: DataConfig
    rounds: int
    seconds: float
    say: Callable[[str], None]


@dataclass(frozen=True)
class Row:
    """One implementation of one case.

    Attributes:
        seconds: median over rounds of a step's mean time.
        spread: (slowest - fastest round) / median: what the machine's mood did.
        floor_seconds: the same of the matrix products alone.
        ratio: median over rounds of this row's time over the floor's in the same round.
        to_ours: the same over our implementation's; above 1 is slower than moescale.
        allocator: name of the environment that the process ran in.
    """

    case: str
    impl: str
    dtype: str
    threads: int
    seconds: float
    spread: float
    floor_seconds: float
    ratio: float
    to_ours: float
    tokens_per_second: float
    allocator: str
    note: str


@dataclass(frozen=True)
class Report:
    """Rows and the machine that they were measured on."""

    machine: dict[str, Any]
    rows: list[Row]

    def as_json(self) -> dict[str, Any]:
        return {"machine": self.machine, "rows": [asdict(row) for row in self.rows]}

    def table(self) -> Table:
        """For a terminal."""
        machine = self.machine
        caption = (
            f"{machine['cpu']}, {machine['cores']} cores, torch {machine['versions'].get('torch')}, load "
            f"{machine['load']:.1f} before the first row"
        )
        table = Table(caption=caption, caption_justify="left")
        for heading in ("case", "dtype", "allocator", "implementation"):
            table.add_column(heading, no_wrap=True)
        for heading in ("threads", "ms a step", "spread", "tokens/s", "x floor", "x ours"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("note", overflow="fold")
        before: tuple[str, str, str] | None = None
        for row in self.rows:
            here = (row.case, row.dtype, row.allocator)
            if before is not None and here != before:
                table.add_section()
            before = here
            table.add_row(
                *here,
                row.impl,
                str(row.threads),
                f"{row.seconds * 1e3:.2f}",
                f"{row.spread:.0%}",
                f"{row.tokens_per_second:,.0f}",
                f"{row.ratio:.2f}",
                f"{row.to_ours:.2f}",
                row.note,
            )
        return table


@dataclass(frozen=True)
class Timing:
    """The mean step time of each round, in seconds, and what the implementation says of itself."""

    rounds: tuple[float, ...]
    note: str

    @property
    def seconds(self) -> float:
        return statistics.median(self.rounds)

    @property
    def spread(self) -> float:
        return (max(self.rounds) - min(self.rounds)) / self.seconds

    def ratio(self, other: "Timing") -> float:
        """Median over rounds of this time over the other's.

        Neighbouring turns see the same mood of the machine, so this is steadier than a ratio of medians.
        """
        return statistics.median(mine / theirs for mine, theirs in zip(self.rounds, other.rounds, strict=True))


def interleave(children: Mapping[str, Child], rounds: int, seconds: float) -> dict[str, Timing]:
    """Time implementations in turns A B C A B C ..., so that a drifting clock or a busy neighbour hits all alike.

    Only one process computes at a time.

    Args:
        rounds: turns of each, after its warm-up.
        seconds: length of a turn, at least one step.
    """
    notes = {name: child.warm_up() for name, child in children.items()}
    times: dict[str, list[float]] = {name: [] for name in children}
    for _ in range(rounds):
        for name, child in children.items():
            times[name].append(child.measure(seconds))
    return {name: Timing(tuple(found), notes[name]) for name, found in times.items()}


def machine() -> dict[str, Any]:
    """What the rows hold for. ``load`` is the one-minute load average: figures from a busy machine are noisy."""
    about = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fields = dict(line.split(":", 1) for line in reversed(about.splitlines()) if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    flags = fields.get("flags", fields.get("Features", "")).split()
    return {
        "cpu": fields.get("model name", platform.processor() or platform.machine()),
        "vector_units": [unit for unit in _VECTOR_UNITS if unit in flags],
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load": os.getloadavg()[0],
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
