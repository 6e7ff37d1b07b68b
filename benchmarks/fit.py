"""``moescale bench fit``: intervals by resampling, ours beside a plain loop over scipy's L-BFGS-B.

A step fits the five-parameter law of Hoffmann et al. to made-up runs from its whole grid of starts, then to every
resampling of the runs. The floor is what the fitter cannot do without: as many evaluations of the law and its
derivative as ours made, in the same batches, and nothing else.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from .harness import FLOOR, OURS, Implementation, Request, chosen_cases, chosen_peers, measured_rows
from .report import Row

FACTORIES = {OURS: ".fit_loops:Batch", "scipy": ".fit_loops:ScipyLoop", FLOOR: ".fit_loops:Evaluations"}
PEERS = ("scipy",)
TURN = 0.0  # seconds: one step


@dataclass(frozen=True)
class FitCase:
    """How many runs are fitted, and how often they are drawn again."""

    name: str
    points: int
    resamples: int
    dtype: str = "fp64"
    threads: int = 1

    @property
    def tokens(self) -> int:
        """None are worked on."""
        return 0


CASES = [FitCase("tiny", points=30, resamples=10), FitCase("chinchilla", points=250, resamples=1000)]
DEFAULT = ("chinchilla",)


def rows(request: Request) -> Iterator[Row]:
    """Rows of every case under every allocator setting, as they are measured.

    Raises:
        UserError: an unknown case or peer.
    """
    peers = chosen_peers("fit", request, PEERS)
    for case in chosen_cases("fit", request, CASES, DEFAULT, lambda case, threads: replace(case, threads=threads)):
        payload = {"points": case.points, "resamples": case.resamples}
        implementations = {name: Implementation(FACTORIES[name], payload) for name in (OURS, *peers, FLOOR)}
        yield from measured_rows(case, implementations, request, TURN)
