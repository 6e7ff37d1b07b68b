"""What all benchmarks share: what the user may ask for, and timing that treats all implementations alike."""

import importlib.util
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from ..base.errors import UserError
from ..data.config import DataConfig
from .child import Child
from .report import Row

OURS, FLOOR = "moescale", "floor"


@dataclass(frozen=True)
class Request:
    """What the user asked for; see `run.run`."""

    against: tuple[str, ...] | None
    cases: tuple[str, ...] | None
    threads: int | None
    allocators: Mapping[str, Mapping[str, str]]
    data: DataConfig
    rounds: int
    seconds: float
    say: Callable[[str], None]


class Case(Protocol):
    """What is measured; ``tokens`` is how many a step works on."""

    @property
    def name(self) -> str: ...

    @property
    def dtype(self) -> str: ...

    @property
    def threads(self) -> int: ...

    @property
    def tokens(self) -> int: ...


AnyCase = TypeVar("AnyCase", bound=Case)


@dataclass(frozen=True)
class Implementation:
    """How a `Child` makes it: the factory's name, its keyword arguments, and variables that it alone gets."""

    factory: str
    payload: Mapping[str, Any]
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Timing:
    """The mean step time of each round, in seconds, and what the implementation says of itself."""

    rounds: tuple[float, ...]
    note: str
    peak_bytes: int

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


def chosen_peers(benchmark: str, request: Request, known: Sequence[str]) -> tuple[str, ...]:
    """The peers to compare with, in the benchmark's order.

    Raises:
        UserError: an unknown peer, or one that is not installed.
    """
    wanted = known if request.against is None else request.against
    for peer in wanted:
        if peer not in known:
            raise UserError(f"--against {peer}: unknown; bench {benchmark} compares with {', '.join(known)}")
    if "transformers" in wanted and importlib.util.find_spec("transformers") is None:
        raise UserError("--against transformers: not installed; pip install 'moescale[hf]', or leave it out")
    return tuple(peer for peer in known if peer in wanted)


def chosen_cases(
    benchmark: str,
    request: Request,
    cases: Sequence[AnyCase],
    default: Sequence[str],
    with_threads: Callable[[AnyCase, int], AnyCase],
) -> list[AnyCase]:
    """The cases of the names asked for; those that differ in threads alone are one where the user gave threads.

    Raises:
        UserError: an unknown case.
    """
    known = dict.fromkeys(case.name for case in cases)
    wanted = default if request.cases is None else request.cases
    for name in wanted:
        if name not in known:
            raise UserError(f"--case {name}: unknown; bench {benchmark} has {', '.join(known)}")
    chosen = [case for case in cases if case.name in wanted]
    if request.threads is None:
        return chosen
    return list(dict.fromkeys(with_threads(case, request.threads) for case in chosen))


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
    peaks = {name: child.peak_bytes() for name, child in children.items()}
    return {name: Timing(tuple(found), notes[name], peaks[name]) for name, found in times.items()}


def measured_rows(
    case: Case, implementations: Mapping[str, Implementation], request: Request, seconds: float
) -> Iterator[Row]:
    """Rows of a case under every allocator setting, as they are measured.

    Args:
        implementations: `OURS` and `FLOOR` are among them.
        seconds: length of a turn.
    """
    for allocator, environment in request.allocators.items():
        request.say(f"{case.name} {case.dtype}, {case.threads} threads, {allocator} allocator")
        with ExitStack() as stack:
            children = {
                name: stack.enter_context(
                    Child(one.factory, one.payload, case.threads, {**environment, **one.environment})
                )
                for name, one in implementations.items()
            }
            moved = {name: child.wait_until_built() for name, child in children.items()}
            timings = interleave(children, request.rounds, seconds)
        for name, timing in timings.items():
            bytes_moved = moved[name]
            yield Row(
                case=case.name,
                impl=name,
                dtype=case.dtype,
                threads=case.threads,
                seconds=timing.seconds,
                spread=timing.spread,
                floor_seconds=timings[FLOOR].seconds,
                ratio=timing.ratio(timings[FLOOR]),
                to_ours=timing.ratio(timings[OURS]),
                tokens_per_second=case.tokens / timing.seconds,
                allocator=allocator,
                peak_bytes=timing.peak_bytes,
                gigabytes_per_second=None if bytes_moved is None else bytes_moved / timing.seconds / 1e9,
                note=timing.note,
            )
