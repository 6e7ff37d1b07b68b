"""``moescale bench NAME``: looks the benchmark up and collects its rows."""

import importlib
from collections.abc import Callable, Mapping, Sequence

from ..base.errors import UserError
from ..data.config import DataConfig, DomainConfig
from .harness import Request
from .report import Report, machine

# Each is a module with ``rows(request) -> Iterator[Row]``.
BENCHMARKS = ("moe", "dispatch", "exchange", "step", "fit", "checkpoint", "convert")


def run(
    name: str,
    *,
    allocators: Mapping[str, Mapping[str, str]],
    against: Sequence[str] | None = None,
    cases: Sequence[str] | None = None,
    threads: int | None = None,
    data: DataConfig | None = None,
    rounds: int = 15,
    seconds: float = 1.0,
    say: Callable[[str], None] = lambda text: None,
) -> Report:
    """Run the benchmark ``name``; nothing is computed in this process.

    Args:
        allocators: environment variables of the measured processes, by the name that rows show; each case runs once
            under each of them.
        against: peers beside our implementation and the floor, which always run; default: all that the benchmark has.
        cases: default: those the benchmark runs by itself.
        threads: of every case; default: each case's own.
        data: text for the cases that read any; default: Python's standard library.
        rounds: turns that each implementation gets.
        seconds: length of a turn, at least one step.
        say: takes a line of progress.

    Raises:
        UserError: no such benchmark, case or peer, or a peer is not installed.
        RuntimeError: a measured process failed; the text ends with what it said.
    """
    if name not in BENCHMARKS:
        raise UserError(f"bench {name}: no such benchmark; there is {', '.join(BENCHMARKS)}")
    request = Request(
        against=None if against is None else tuple(against),
        cases=None if cases is None else tuple(cases),
        threads=threads,
        allocators=allocators,
        data=data or DataConfig(domains={"stdlib": DomainConfig(source="stdlib")}),
        rounds=rounds,
        seconds=seconds,
        say=say,
    )
    benchmark = importlib.import_module(f".{name}", __package__)
    described = machine()  # before the load that we cause ourselves
    return Report(described, list(benchmark.rows(request)))
