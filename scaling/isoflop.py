"""IsoFLOP profiles, best losses at equal compute, and dense against MoE.

A profile is one family at one budget: final loss over model size. A parabola in log N through the points nearest to
the smallest loss gives the optimum (Hoffmann et al. 2022, approach 2), with Akima's interpolation beside it, if there
are points on both sides of it (`minima`). Otherwise the profile is flagged as an edge: its smallest loss is then only
an upper bound of the best one.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from .cells import DENSE, budgets_of, families_of, finished
from .fit import Fit, fit
from .fitted import LEVEL, Estimate
from .minima import Minimum, minimum
from .points import Point
from .seeds import Difference, SeedNoise, reach

__all__ = ["Comparison", "Profile", "Size", "best_loss_fits", "compare", "profiles"]

DRAWS = 1000  # of the errors behind an interval
LARGEST_LOG = 50.0  # logarithm of a compute multiple beyond which it means nothing
FEWEST_BUDGETS = 3  # for a power law of two coefficients


@dataclass(frozen=True)
class Size:
    """Runs of one model size: means over seeds."""

    n: float
    d: float
    loss: float
    seeds: int


@dataclass(frozen=True)
class Profile:
    """One family at one budget.

    Attributes:
        budget: FLOPs.
        sizes: by ascending active parameters.
        minimum: of the loss over active parameters, nats a token.
        d_best: tokens at the optimal size.
    """

    family: str
    budget: float
    sizes: tuple[Size, ...]
    minimum: Minimum
    d_best: float

    @property
    def interior(self) -> bool:
        """Whether the optimum is bracketed by measured sizes."""
        return self.minimum.interior

    @property
    def n_best(self) -> float:
        """Optimal active parameters (parabola), or the best measured size at an edge."""
        return self.minimum.at

    @property
    def loss_best(self) -> float:
        """Loss of the parabola's vertex, or the smallest measured one at an edge."""
        return self.minimum.loss

    @property
    def variance(self) -> float:
        """Of ``loss_best``, in units of the variance of one run over seeds."""
        return self.minimum.variance

    @property
    def remark(self) -> str:
        """Why it is an edge; empty when interior."""
        return self.minimum.remark


@dataclass(frozen=True)
class Comparison:
    """A family against the dense one at one budget.

    Attributes:
        gap: dense best loss minus this family's, nats a token; positive: this family is better.
        multiple: C' / budget, where C' is the compute at which the dense power law of best losses reaches this
            family's best loss; None without such a law.
        low, high: 95 % interval of the multiple: uncertainty of the dense power law and, where it was measured, seed
            noise of this family's loss.
        extrapolated: C' lies outside the budgets of the dense runs.
        edge: one of the two best losses is an edge's.
    """

    family: str
    budget: float
    gap: Difference
    multiple: float | None
    low: float | None
    high: float | None
    extrapolated: bool
    edge: bool


def profiles(points: Sequence[Point], noise: SeedNoise | None = None) -> list[Profile]:
    """All isoFLOP profiles of finished points: the dense family first, others as they come, by ascending budget."""
    points = finished(points)
    budgets = budgets_of(points)
    cells: dict[tuple[str, float], dict[float, list[Point]]] = {}
    for point in points:
        sizes = cells.setdefault((point.family, budgets[point.run]), {})
        sizes.setdefault(point.n_active or 0.0, []).append(point)
    families = families_of(points)
    ordered = sorted(cells.items(), key=lambda cell: (families.index(cell[0][0]), cell[0][1]))
    return [_profile(family, budget, sizes, noise) for (family, budget), sizes in ordered]


def _profile(family: str, budget: float, runs: dict[float, list[Point]], noise: SeedNoise | None) -> Profile:
    sizes = tuple(_size(n, cell) for n, cell in sorted(runs.items()))
    spread = noise.of(family)[1] if noise else None
    log_n, log_d = np.log([(size.n, size.d) for size in sizes]).T
    found = minimum([size.n for size in sizes], [size.loss for size in sizes], [size.seeds for size in sizes], spread)
    d_best = math.exp(float(np.interp(math.log(found.at), log_n, log_d)))
    return Profile(family, budget, sizes, found, d_best)


def _size(n: float, runs: Sequence[Point]) -> Size:
    """Runs of one size. Where several settings (learning rate, batch) were tried, the best one counts."""
    settings: dict[tuple[object, ...], list[Point]] = {}
    for point in runs:
        settings.setdefault((point.n_total, point.b, point.lr), []).append(point)
    sizes = [
        Size(n, float(np.mean([p.d for p in cell])), float(np.mean([p.loss for p in cell])), len(cell))
        for cell in settings.values()
    ]
    return min(sizes, key=lambda size: size.loss)


def best_loss_fits(found: Sequence[Profile], noise: SeedNoise | None = None, seed: int = 0) -> dict[str, Fit]:
    """For each family with enough budgets, the power law of its best losses over compute.

    Resampling three or four points says little, so the intervals come from drawn errors: residuals and, where it was
    measured, seed noise estimate their size together.
    """
    fits = {}
    for family in dict.fromkeys(p.family for p in found):
        own = [p for p in found if p.family == family]
        if len(own) < FEWEST_BUDGETS:
            continue
        compute, loss = np.array([p.budget for p in own]), np.array([p.loss_best for p in own])
        fits[family] = _with_intervals(fit("power", {"c": compute}, loss), own, noise, seed)
    return fits


def _with_intervals(law: Fit, own: Sequence[Profile], noise: SeedNoise | None, seed: int) -> Fit:
    log_c = np.log([p.budget for p in own])
    fitted = np.log(law.values["a"]) - law.values["b"] * log_c
    residual = np.log([p.loss_best for p in own]) - fitted
    spread = noise.of(own[0].family)[1] if noise else None
    if spread is not None and spread.sd > 0:
        unit = spread.sd * np.sqrt([p.variance for p in own]) / np.exp(fitted)
        freedom = len(own) - 2 + spread.freedom
        square = float(np.sum((residual / unit) ** 2) + spread.freedom) / freedom
        told = "residuals and seed noise together"
    else:
        unit = np.ones(len(own))
        freedom = len(own) - 2
        square = float(np.sum(residual**2)) / freedom
        told = "residuals alone, seed noise not being measured"
    rng = np.random.default_rng(seed)
    size = np.sqrt(square * freedom / rng.chisquare(freedom, DRAWS))
    drawn = fitted + unit * rng.standard_normal((DRAWS, len(own))) * size[:, None]
    slope, intercept = np.polyfit(log_c, drawn.T, 1)
    samples = np.column_stack([np.exp(np.clip(intercept, -600, 600)), -slope])
    ends = np.percentile(samples, LEVEL, axis=0).T
    coefficients = {
        name: estimate if estimate.value is None else Estimate(estimate.value, float(low), float(high))
        for (name, estimate), (low, high) in zip(law.coefficients.items(), ends, strict=True)
    }
    intervals = f"95 %, Student's t with {freedom} degrees of freedom; size of the errors from {told}"
    return replace(
        law, coefficients=coefficients, samples=samples, conventions={**law.conventions, "intervals": intervals}
    )


def compare(
    found: Sequence[Profile], fits: Mapping[str, Fit], noise: SeedNoise | None, dense: str = DENSE
) -> list[Comparison]:
    """Every other family against ``dense``, at the budgets they share."""
    reference = {p.budget: p for p in found if p.family == dense}
    result = []
    for profile in found:
        base = reference.get(profile.budget)
        if profile.family == dense or base is None:
            continue
        multiple, low, high = None, None, None
        if dense in fits:
            multiple = _multiple(fits[dense].values, profile.loss_best, profile.budget)
        if multiple is not None:
            low, high = _multiple_interval(fits[dense], profile, noise) or (None, None)
        reached = (multiple or 0.0) * profile.budget
        result.append(
            Comparison(
                family=profile.family,
                budget=profile.budget,
                gap=_gap(base, profile, noise),
                multiple=multiple,
                low=low,
                high=high,
                extrapolated=bool(reached) and not min(reference) <= reached <= max(reference),
                edge=not (profile.interior and base.interior),
            )
        )
    return result


def _gap(base: Profile, profile: Profile, noise: SeedNoise | None) -> Difference:
    value = base.loss_best - profile.loss_best
    found = reach(noise, [(base.family, base.variance), (profile.family, profile.variance)])
    return Difference(value, None) if found is None else Difference(value, *found)


def _multiple(power: Mapping[str, float], loss: float, budget: float) -> float | None:
    """Compute at which the power law reaches ``loss``, over ``budget``; None where the law does not fall."""
    if power["b"] <= 0:
        return None
    log = math.log(power["a"] / loss) / power["b"] - math.log(budget)
    return math.exp(log) if abs(log) < LARGEST_LOG else None


def _multiple_interval(dense: Fit, profile: Profile, noise: SeedNoise | None) -> tuple[float, float] | None:
    rng = np.random.default_rng(0)
    spread = noise.of(profile.family)[1] if noise else None

    def draw(power: Mapping[str, float]) -> float:
        error = spread.sd * math.sqrt(profile.variance) * rng.standard_t(spread.freedom) if spread else 0.0
        multiple = _multiple(power, max(profile.loss_best + error, 1e-3), profile.budget)
        return math.inf if multiple is None else multiple

    ends = dense.interval(draw)
    return ends if ends is not None and all(map(math.isfinite, ends)) else None
