"""Loss over size and sparsity at one budget: a surface, its valleys, and where the data say nothing.

Abnar et al. 2025 (arXiv 2501.12370) describe each budget by a polynomial of degree (2, 2, 2) in x = log N,
y = -log(1 - S) and their product: ``L = c + a1 x + a2 x^2 + b1 y + b2 y^2 + d1 xy + d2 (xy)^2``, with N all
non-embedding parameters. The sparsest points are held out and predicted first; the surface whose minima are reported
goes through all of them.

A minimum counts where it lies strictly inside the region that runs span (the convex hull in x and y); elsewhere the
polynomial is a guess, and the answer is "at the edge: not determined". Intervals come from drawing errors for every
loss: seed noise and the surface's own misfit together.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import Delaunay, QhullError

from .cells import cells_of
from .fitted import LEVEL, Estimate
from .laws import Array
from .points import Point
from .seeds import SeedNoise

COEFFICIENTS = 7
GRID = 121  # places along a cut through the surface
DRAWS = 300
SIZES = 4  # between the smallest and the largest mixture, at which the best sparsity is asked for
EDGE = "at the edge: not determined"
DETERMINED = 0.95  # share of draws whose minimum must lie inside, for an interval


@dataclass(frozen=True)
class Optimum:
    """The smallest loss along a cut through the surface.

    Attributes:
        fixed: what is held, in words: "S 0.875", "N 1.2M" or "compute alone".
        n, s: optimal total parameters and sparsity, with 95 % intervals; None where not determined.
        loss: there.
        remark: why it is not determined; empty where it is.
    """

    fixed: str
    n: Estimate | None
    s: Estimate | None
    loss: float | None
    remark: str


@dataclass(frozen=True)
class Surface:
    """One budget at one granularity.

    Attributes:
        g: granularity of the mixtures on it.
        points: cells that it goes through (means over seeds).
        rmse: of the fit, nats a token.
        held_s: sparsity of the points held out; None where too few others were left to fit.
        held_error: root mean square of prediction minus loss on them, nats a token.
        at_s: best size at each measured sparsity.
        at_n: best sparsity at a few sizes among those of the mixtures, at fixed size and compute.
        overall: best size and sparsity at this compute.
        why: why there is no surface; empty where there is one.
    """

    budget: float
    g: float
    points: int
    rmse: float | None
    held_s: float | None
    held_error: float | None
    at_s: tuple[Optimum, ...]
    at_n: tuple[Optimum, ...]
    overall: Optimum | None
    why: str
    n: Array = field(compare=False, repr=False)
    s: Array = field(compare=False, repr=False)
    loss: Array = field(compare=False, repr=False)
    fitted: Array = field(compare=False, repr=False)


def surfaces(points: Sequence[Point], noise: SeedNoise | None) -> list[Surface]:
    """A surface for each budget and granularity with three sparsities at least; dense runs are sparsity 0 of each."""
    groups: dict[tuple[float, float], dict[tuple[float, float], list[tuple[float, float]]]] = {}
    dense: dict[float, dict[tuple[float, float], list[tuple[float, float]]]] = {}
    for cell in cells_of(points):
        sample = cell.runs[0]
        if sample.n_total is None or sample.s is None or sample.g is None or sample.shared:
            continue
        spread = noise.of(cell.family)[1].sd if noise else 0.0
        entry = (cell.mean, spread / math.sqrt(len(cell.runs)))
        place = (sample.n_total, sample.s)
        if sample.e in (None, 1):
            dense.setdefault(cell.budget, {}).setdefault(place, []).append(entry)
        else:
            groups.setdefault((cell.budget, sample.g), {}).setdefault(place, []).append(entry)
    found = []
    for (budget, g), cells in sorted(groups.items()):
        # Where several batches or rates were tried at one place the best one counts.
        best = {place: min(entries) for place, entries in {**dense.get(budget, {}), **cells}.items()}
        if len({s for _, s in best}) >= 3:
            found.append(_surface(budget, g, best))
    return found


def _surface(budget: float, g: float, cells: dict[tuple[float, float], tuple[float, float]]) -> Surface:
    n, s = np.array(sorted(cells)).T
    loss, error = np.array([cells[place] for place in sorted(cells)]).T
    x, y = np.log(n), -np.log1p(-s)
    design = _design(x, y)
    why = ""
    if len(loss) <= COEFFICIENTS:
        why = f"{len(loss)} places in N and S; a surface of {COEFFICIENTS} coefficients needs {COEFFICIENTS + 1}"
    elif np.linalg.matrix_rank(design, tol=1e-6 * np.linalg.norm(design, 2)) < COEFFICIENTS:
        why = "sizes and sparsities were not varied independently, so that the surface is not determined by them"
    if why:
        return Surface(
            budget, g, len(loss), None, None, None, (), (), None, why, n, s, loss, np.full(len(loss), np.nan)
        )
    coefficients, *_ = np.linalg.lstsq(design, loss, rcond=None)
    fitted = design @ coefficients
    square = float(np.sum((fitted - loss) ** 2)) / (len(loss) - COEFFICIENTS)
    held_s, held_error = _held_out(x, y, s, loss)
    rng = np.random.default_rng(0)
    freedom = len(loss) - COEFFICIENTS
    misfit = square * freedom / rng.chisquare(freedom, DRAWS)  # known from few points, so its size is drawn too
    drawn = fitted[:, None] + np.sqrt(misfit + error[:, None] ** 2) * rng.standard_normal((len(loss), DRAWS))
    samples = np.linalg.lstsq(design, drawn, rcond=None)[0].T
    try:
        hull = Delaunay(np.column_stack([_unit(x, x), _unit(y, y)]))
    except QhullError:
        why = "the runs lie on one line in N and S"
        return Surface(
            budget, g, len(loss), None, None, None, (), (), None, why, n, s, loss, np.full(len(loss), np.nan)
        )
    cut = _Cut(x, y, hull, np.vstack([coefficients, samples]))
    sparsities = sorted(set(s))
    mixtures = np.log(n[s > 0])
    sizes = [float(f"{math.exp(value):.2g}") for value in np.linspace(mixtures.min(), mixtures.max(), SIZES + 2)[1:-1]]
    return Surface(
        budget=budget,
        g=g,
        points=len(loss),
        rmse=float(np.sqrt(np.mean((fitted - loss) ** 2))),
        held_s=held_s,
        held_error=held_error,
        at_s=tuple(cut.along_n(value) for value in sparsities),
        at_n=tuple(cut.along_s(value) for value in sizes),
        overall=cut.everywhere(),
        why="",
        n=n,
        s=s,
        loss=loss,
        fitted=fitted,
    )


def _design(x: Array, y: Array) -> Array:
    """Columns of the polynomial [n, 7], x measured from a fixed place near log of a million for conditioning."""
    x = x - math.log(1e6)
    return np.column_stack([np.ones_like(x), x, x**2, y, y**2, x * y, (x * y) ** 2])


def _held_out(x: Array, y: Array, s: Array, loss: Array) -> tuple[float | None, float | None]:
    """The sparsest points predicted by a surface through the others."""
    held = s == s.max()
    design = _design(x[~held], y[~held])
    if len(design) <= COEFFICIENTS or np.linalg.matrix_rank(design) < COEFFICIENTS:
        return None, None
    coefficients, *_ = np.linalg.lstsq(design, loss[~held], rcond=None)
    error = _design(x[held], y[held]) @ coefficients - loss[held]
    return float(s.max()), float(np.sqrt(np.mean(error**2)))


def _unit(values: Array, among: Array) -> Array:
    """Values on the scale from 0 to 1 that ``among`` spans."""
    return np.asarray((values - among.min()) / max(float(np.ptp(among)), 1e-12))


@dataclass(frozen=True)
class _Cut:
    """Cuts through the surface and through every drawn one; ``coefficients`` [1 + DRAWS, 7], the fitted one first."""

    x: Array
    y: Array
    hull: Delaunay
    coefficients: Array

    def along_n(self, s: float) -> Optimum:
        """Best size at a sparsity."""
        grid = np.linspace(self.x.min(), self.x.max(), GRID)
        y = np.full(GRID, -math.log1p(-s))
        place, estimate, loss, remark = self._best(grid, y, lambda at: math.exp(np.interp(at, _places_of(grid), grid)))
        return Optimum(f"S {s:.3g}", estimate, _exactly(s) if place is not None else None, loss, remark)

    def along_s(self, n: float) -> Optimum:
        """Best sparsity at a size, compute being that of the surface."""
        grid = np.linspace(self.y.min(), self.y.max(), GRID)
        x = np.full(GRID, math.log(n))
        place, estimate, loss, remark = self._best(
            x, grid, lambda at: -math.expm1(-np.interp(at, _places_of(grid), grid))
        )
        return Optimum(f"N {n:.3g}", _exactly(n) if place is not None else None, estimate, loss, remark)

    def everywhere(self) -> Optimum:
        """Best size and sparsity together."""
        x, y = np.meshgrid(np.linspace(self.x.min(), self.x.max(), 61), np.linspace(self.y.min(), self.y.max(), 61))
        flat_x, flat_y = x.ravel(), y.ravel()
        inside, rim = self._region(flat_x, flat_y)
        values = np.where(inside, self.coefficients @ _design(flat_x, flat_y).T, np.inf)
        places = values.argmin(axis=1)
        good = ~rim[places]
        if not good[0] or good[1:].mean() < DETERMINED:
            return Optimum("compute alone", None, None, None, EDGE)
        kept = np.flatnonzero(good)  # the fitted surface comes first
        side = x.shape[0]
        rows, columns = np.divmod(places[kept], side)
        squares = values[kept].reshape(len(kept), side, side)
        log_n = [
            np.interp(_between(square[row], int(column)), _places_of(x[0]), x[0])
            for square, row, column in zip(squares, rows, columns, strict=True)
        ]
        odds = [
            np.interp(_between(square[:, column], int(row)), _places_of(y[:, 0]), y[:, 0])
            for square, row, column in zip(squares, rows, columns, strict=True)
        ]
        n, s = np.exp(log_n), -np.expm1(-np.array(odds))
        return Optimum(
            "compute alone",
            Estimate(float(n[0]), *map(float, np.percentile(n[1:], LEVEL))),
            Estimate(float(s[0]), *map(float, np.percentile(s[1:], LEVEL))),
            float(values[0, places[0]]),
            "",
        )

    def _best(
        self, x: Array, y: Array, value_at: Callable[[float], float]
    ) -> tuple[float | None, Estimate | None, float | None, str]:
        inside = self._inside(x, y)
        if inside.sum() < 3:
            return None, None, None, "no runs on both sides"
        first, last = int(np.argmax(inside)), len(inside) - 1 - int(np.argmax(inside[::-1]))
        values = np.where(inside, self.coefficients @ _design(x, y).T, np.inf)
        places = values.argmin(axis=1)
        good = (places > first) & (places < last)
        if not good[0] or good[1:].mean() < DETERMINED:
            return None, None, None, EDGE
        kept = np.flatnonzero(good)  # the fitted surface comes first
        between = [_between(values[row], int(places[row])) for row in kept]
        low, high = map(float, np.percentile([value_at(place) for place in between[1:]], LEVEL))
        return between[0], Estimate(value_at(between[0]), low, high), float(values[0, places[0]]), ""

    def _inside(self, x: Array, y: Array) -> NDArray[np.bool_]:
        inside: NDArray[np.bool_] = (
            self.hull.find_simplex(np.column_stack([_unit(x, self.x), _unit(y, self.y)]), tol=1e-9) >= 0
        )
        return inside

    def _region(self, x: Array, y: Array) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Which places of a square grid lie inside the hull, and which of them beside one that does not."""
        inside = self._inside(x, y)
        side = math.isqrt(len(x))
        square = np.pad(inside.reshape(side, side), 1)
        around = square[:-2, 1:-1] & square[2:, 1:-1] & square[1:-1, :-2] & square[1:-1, 2:]
        return inside, inside & ~around.ravel()


def _places_of(grid: Array) -> Array:
    """0, 1, 2, ... for every value of a grid."""
    return np.arange(len(grid), dtype=float)


def _between(values: Array, place: int) -> float:
    """Where on the grid the minimum near ``place`` lies: the vertex of a parabola through it and its neighbours."""
    before, here, after = values[place - 1], values[place], values[place + 1]
    bend = before - 2 * here + after
    return float(place + 0.5 * (before - after) / bend) if np.isfinite(bend) and bend > 0 else float(place)


def _exactly(value: float) -> Estimate:
    return Estimate(value, None, None)
