"""What a benchmark says: rows, and the machine that they hold for."""

import importlib.metadata
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

_PACKAGES = ("moescale", "torch", "deepspeed", "megatron-core", "transformers")
_VECTOR_UNITS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")


@dataclass(frozen=True)
class Row:
    """One implementation of one case.

    Attributes:
        seconds: median over rounds of a step's mean time.
        spread: (slowest - fastest round) / median: what the machine's mood did.
        floor_seconds: the same of the floor: what a step cannot do without, and nothing else.
        ratio: median over rounds of this row's time over the floor's in the same round.
        to_ours: the same over our implementation's; above 1 is slower than moescale.
        allocator: name of the environment that the process ran in.
        peak_bytes: most that tensors allocated in a step occupy at once, gradients included; what lives between
            steps is not.
        gigabytes_per_second: bytes read and written over ``seconds``; None where memory traffic is not the limit.
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
    peak_bytes: int
    gigabytes_per_second: float | None
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
            f"{machine['gpu'] or machine['cpu']}, {machine['cores']} cores, torch {machine['versions'].get('torch')}, "
            f"load {machine['load']:.1f} before the first row"
        )
        table = Table(caption=caption, caption_justify="left")
        for heading in ("case", "dtype", "allocator", "implementation"):
            table.add_column(heading, no_wrap=True)
        for heading in ("threads", "ms a step", "spread", "tokens/s", "GB/s", "peak MiB", "x floor", "x ours"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("note", overflow="fold")
        before: tuple[str, str, str, int] | None = None
        for row in self.rows:
            here = (row.case, row.dtype, row.allocator, row.threads)
            if before is not None and here != before:
                table.add_section()
            before = here
            table.add_row(
                row.case,
                row.dtype,
                row.allocator,
                row.impl,
                str(row.threads),
                f"{row.seconds * 1e3:.2f}",
                f"{row.spread:.0%}",
                f"{row.tokens_per_second:,.0f}",
                "" if row.gigabytes_per_second is None else f"{row.gigabytes_per_second:.1f}",
                f"{row.peak_bytes / 2**20:.1f}",
                f"{row.ratio:.2f}",
                f"{row.to_ours:.2f}",
                row.note,
            )
        return table


def machine() -> dict[str, Any]:
    """What the rows hold for. ``load`` is the one-minute load average: figures from a busy machine are noisy."""
    about = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fields = dict(line.split(":", 1) for line in reversed(about.splitlines()) if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    flags = fields.get("flags", fields.get("Features", "")).split()
    return {
        "cpu": fields.get("model name", platform.processor() or platform.machine()),
        "gpu": _gpu(),
        "vector_units": [unit for unit in _VECTOR_UNITS if unit in flags],
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load": os.getloadavg()[0],
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
    }


def _gpu() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
