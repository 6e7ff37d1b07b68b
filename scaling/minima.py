"""The minimum of losses measured along one axis, on a logarithmic scale: sizes, batches, learning rates, granularity.

Two estimates are made from the same losses. A parabola in log x through the points nearest to the smallest loss is
smooth and wrong where the valley is not one. Akima's interpolation goes through every point and follows any valley,
and their noise (Porian et al. 2024, arXiv 2406.19146, use it). Where the two differ by more than the interval, the
valley is no parabola on the range measured.

Only an interior minimum counts. Where the smallest loss lies at an end, or the parabola has no minimum between the
points that it goes through, the true one may lie anywhere beyond, and the result says so. Intervals come from drawing
an error for every loss anew, as large as seed noise and the parabola's residuals tell: where more than 2.5 % of the
draws have their minimum at an end, that end of the interval is open.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.interpolate import Akima1DInterpolator

from .laws import Array
from .seeds import Spread

NEAREST = 5  # points that a parabola goes through at most
FEWEST = 3
FEWEST_AKIMA = 4  # through three points it says nothing that the parabola does not
GRID = 400  # places between the ends at which the interpolation is looked at
DRAWS = 1000
LEVEL = (2.5, 97.5)  # percentiles


@dataclass(frozen=True)
class Minimum:
    """Where the smallest loss lies.

    Attributes:
        interior: whether points on both sides bracket it.
        at: x of the parabola's vertex; at an edge the best measured x.
        loss: of the vertex, or the smallest measured one; nats a token.
        variance: of ``loss``, in units of the variance of one run over seeds.
        parabola: coefficients in (ln x - center), highest power first, with their center; None at an edge.
        low, high: 95 % interval of ``at``; None: seed noise not measured, or the interval is open on that side.
        open_low, open_high: whether the interval goes on beyond what was measured.
        akima: x of the interpolation's minimum; None with few points, or where that lies at an end.
        draws: ln x of the minimum for each drawn error [DRAWS]; empty without seed noise, or at an edge.
        remark: why it is an edge; empty when interior.
    """

    interior: bool
    at: float
    loss: float
    variance: float
    parabola: tuple[float, float, float, float] | None
    low: float | None
    high: float | None
    open_low: bool
    open_high: bool
    akima: float | None
    draws: Array = field(compare=False, repr=False)
    remark: str

    @property
    def error(self) -> float | None:
        """Standard deviation of ln ``at`` over draws; None where that is not known."""
        return float(self.draws.std(ddof=1)) if len(self.draws) else None


def minimum(
    x: Sequence[float], loss: Sequence[float], seeds: Sequence[int], spread: Spread | None, what: str = "size"
) -> Minimum:
    """The minimum of ``loss`` over ``x``.

    Args:
        x: ascending, distinct, positive [n].
        loss: mean over seeds, nats a token [n].
        seeds: that each loss is the mean of [n].
        spread: of one run's loss over seeds; None: not measured, so there is no interval.
        what: a value of x, for remarks.
    """
    best = min(range(len(x)), key=lambda i: loss[i])

    def edge(remark: str) -> Minimum:
        return Minimum(
            False, x[best], loss[best], 1 / seeds[best], None, None, None, False, False, None, np.empty(0), remark
        )

    if len(x) < FEWEST:
        return edge(f"only {len(x)} {what}{'s' if len(x) > 1 else ''}")
    if best in (0, len(x) - 1):
        return edge(f"the {'smallest' if best == 0 else 'largest'} {what} is the best")
    near = sorted(sorted(range(len(x)), key=lambda i: (abs(i - best), i))[:NEAREST])
    log_x = np.log([x[i] for i in near])
    losses, counts = np.array([loss[i] for i in near]), np.array([seeds[i] for i in near])
    center = float(log_x.mean())
    curve = np.polyfit(log_x - center, losses, 2)
    vertex = center - curve[1] / (2 * curve[0])
    if curve[0] <= 0 or not log_x[0] < vertex < log_x[-1]:
        return edge(f"the parabola has no minimum between the {what}s")
    # At the vertex the parabola's value depends on the losses, to first order, as a fixed mean of them.
    solve: Array = np.linalg.pinv(np.vander(log_x - center, 3)).astype(float)
    weights = np.vander([vertex - center], 3)[0] @ solve
    draws = np.empty(0) if spread is None else _draws(log_x - center, losses, counts, spread, curve, solve) + center
    ends: tuple[float | None, float | None] = (None, None)
    open_low = open_high = False
    if len(draws):
        low, high = np.percentile(draws, LEVEL)
        open_low, open_high = bool(low <= log_x[0]), bool(high >= log_x[-1])
        ends = (None if open_low else math.exp(low), None if open_high else math.exp(high))
    return Minimum(
        interior=True,
        at=math.exp(vertex),
        loss=float(np.polyval(curve, vertex - center)),
        variance=float(np.sum(weights**2 / counts)),
        parabola=(float(curve[0]), float(curve[1]), float(curve[2]), center),
        low=ends[0],
        high=ends[1],
        open_low=open_low,
        open_high=open_high,
        akima=_akima(np.log(x), np.array(loss)),
        draws=draws,
        remark="",
    )


def _draws(x: Array, losses: Array, counts: Array, spread: Spread, curve: Array, solve: Array) -> Array:
    """Vertex of the parabola for each drawn set of errors [DRAWS]; at the lower end where there is no vertex between.

    How large the errors are comes from the deviation over seeds and the parabola's residuals together, and is drawn
    too, since both are known from few runs.
    """
    rng = np.random.default_rng(0)
    unit = max(spread.sd, 1e-12) / np.sqrt(counts)
    fitted = np.polyval(curve, x)
    freedom = len(x) - 3 + spread.freedom
    squares = float(np.sum(((losses - fitted) / unit) ** 2)) + spread.freedom
    size = np.sqrt(squares / rng.chisquare(freedom, DRAWS))
    drawn = fitted + size[:, None] * unit * rng.standard_normal((DRAWS, len(x)))
    a, b, _ = solve @ drawn.T
    with np.errstate(divide="ignore", invalid="ignore"):
        vertex = -b / (2 * a)
    lower_end = np.where(a * x[0] ** 2 + b * x[0] < a * x[-1] ** 2 + b * x[-1], x[0], x[-1])
    return np.where((a > 0) & (vertex > x[0]) & (vertex < x[-1]), vertex, lower_end)


def _akima(log_x: Array, loss: Array) -> float | None:
    if len(log_x) < FEWEST_AKIMA:
        return None
    grid = np.linspace(log_x[0], log_x[-1], GRID)
    place = int(np.argmin(Akima1DInterpolator(log_x, loss)(grid)))
    return None if place in (0, GRID - 1) else math.exp(grid[place])
