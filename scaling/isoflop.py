"""IsoFLOP profiles, best losses at equal compute, and dense against MoE.

A profile is one family at one budget: final loss over model size. A parabola in log N through the points nearest to
the smallest loss gives the optimum (Hoffmann et al. 2022, approach 2), if there are points on both sides of it.
Otherwise the profile is flagged as an edge: its smallest loss is then only an upper bound of the best one.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .fit import Fit, fit
from .points import Point

SAME_BUDGET = 1.1  # ratio of FLOPs within which runs count as one budget
NEAREST = 5  # sizes that a parabola goes through at most
DENSE = "dense"  # the family that others are compared with
UNRESOLVED = 2.0  # standard deviations below which an effect is called unresolved
BOOTSTRAP = 400
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
        interior: whether the optimum is bracketed by measured sizes.
        n_best: optimal active parameters (parabola), or the best measured size at an edge.
        d_best: tokens there.
        loss_best: loss of the parabola's vertex, or the smallest measured one at an edge.
        parabola: coefficients in (ln n - center), highest power first, with their center; None at an edge.
        remark: why it is an edge; empty when interior.
    """

    family: str
    budget: float
    sizes: tuple[Size, ...]
    interior: bool
    n_best: float
    d_best: float
    loss_best: float
    parabola: tuple[float, float, float, float] | None
    remark: str


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
        resolved: whether the gap exceeds two standard deviations of a difference between two runs; None where no
            cell has several seeds.
    """

    family: str
    budget: float
    gap: float
    multiple: float | None
    low: float | None
    high: float | None
    extrapolated: bool
    edge: bool
    resolved: bool | None


@dataclass(frozen=True)
class SeedNoise:
    """Spread of the final loss over seeds, pooled over all cells with several: standard deviation and its freedom."""

    sd: float
    freedom: int
    cells: tuple[tuple[str, tuple[float, ...]], ...]


def finished(points: Iterable[Point]) -> list[Point]:
    """The points that profiles are made of."""
    return [p for p in points if p.state == "done" and None not in (p.loss, p.c, p.d, p.n_active)]


def budgets_of(points: Sequence[Point]) -> dict[str, float]:
    """Run -> nominal budget: runs whose FLOPs lie close together share their geometric mean, at two digits."""
    ordered = sorted(points, key=lambda p: p.c or 0.0)
    groups: list[list[Point]] = []
    for point in ordered:
        if groups and (point.c or 0.0) <= SAME_BUDGET * (groups[-1][0].c or 0.0):
            groups[-1].append(point)
        else:
            groups.append([point])
    result = {}
    for group in groups:
        mean = math.exp(float(np.mean([math.log(p.c or 1.0) for p in group])))
        result.update({p.run: float(f"{mean:.1e}") for p in group})
    return result


def profiles(points: Sequence[Point]) -> list[Profile]:
    """All isoFLOP profiles of finished points: the dense family first, others as they come, by ascending budget."""
    points = finished(points)
    budgets = budgets_of(points)
    cells: dict[tuple[str, float], dict[float, list[Point]]] = {}
    for point in points:
        sizes = cells.setdefault((point.family, budgets[point.run]), {})
        sizes.setdefault(point.n_active or 0.0, []).append(point)
    families = list(dict.fromkeys(point.family for point in points))
    families.sort(key=lambda family: family != DENSE)
    ordered = sorted(cells.items(), key=lambda cell: (families.index(cell[0][0]), cell[0][1]))
    return [_profile(family, budget, sizes) for (family, budget), sizes in ordered]


def _profile(family: str, budget: float, runs: dict[float, list[Point]]) -> Profile:
    sizes = tuple(_size(n, cell) for n, cell in sorted(runs.items()))
    best = min(range(len(sizes)), key=lambda i: sizes[i].loss)

    def edge(remark: str) -> Profile:
        at = sizes[best]
        return Profile(family, budget, sizes, False, at.n, at.d, at.loss, None, remark)

    if len(sizes) < 3:
        return edge(f"only {len(sizes)} size{'s' if len(sizes) > 1 else ''}")
    if best in (0, len(sizes) - 1):
        return edge(f"the {'smallest' if best == 0 else 'largest'} size is the best")
    near = sorted(sorted(range(len(sizes)), key=lambda i: (abs(i - best), i))[:NEAREST])
    log_n = np.log([sizes[i].n for i in near])
    center = float(log_n.mean())
    curve = np.polyfit(log_n - center, [sizes[i].loss for i in near], 2)
    vertex = center - curve[1] / (2 * curve[0])
    if curve[0] <= 0 or not log_n[0] < vertex < log_n[-1]:
        return edge("the parabola has no minimum between the sizes")
    log_d = np.interp(vertex, log_n, np.log([sizes[i].d for i in near]))
    loss = float(np.polyval(curve, vertex - center))
    parabola = (float(curve[0]), float(curve[1]), float(curve[2]), center)
    return Profile(family, budget, sizes, True, math.exp(vertex), math.exp(log_d), loss, parabola, "")


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


def best_loss_fits(found: Sequence[Profile], seed: int = 0) -> dict[str, Fit]:
    """For each family with enough budgets, the power law of its best losses over compute."""
    fits = {}
    for family in dict.fromkeys(p.family for p in found):
        own = [p for p in found if p.family == family]
        if len(own) < FEWEST_BUDGETS:
            continue
        compute, loss = np.array([p.budget for p in own]), np.array([p.loss_best for p in own])
        fits[family] = fit("power", {"c": compute}, loss, bootstrap=BOOTSTRAP, seed=seed)
    return fits


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
        gap = base.loss_best - profile.loss_best
        multiple, low, high = None, None, None
        if dense in fits:
            multiple = _multiple(fits[dense].values, profile.loss_best, profile.budget)
            low, high = _multiple_interval(fits[dense], profile, noise) or (None, None)
        reached = (multiple or 0.0) * profile.budget
        result.append(
            Comparison(
                family=profile.family,
                budget=profile.budget,
                gap=gap,
                multiple=multiple,
                low=low,
                high=high,
                extrapolated=bool(reached) and not min(reference) <= reached <= max(reference),
                edge=not (profile.interior and base.interior),
                resolved=None if noise is None else abs(gap) > UNRESOLVED * math.sqrt(2) * noise.sd,
            )
        )
    return result


def _multiple(power: Mapping[str, float], loss: float, budget: float) -> float | None:
    """Compute at which the power law reaches ``loss``, over ``budget``; None where the law does not fall."""
    if power["b"] <= 0:
        return None
    log = math.log(power["a"] / loss) / power["b"] - math.log(budget)
    return math.exp(log) if abs(log) < LARGEST_LOG else None


def _multiple_interval(dense: Fit, profile: Profile, noise: SeedNoise | None) -> tuple[float, float] | None:
    rng = np.random.default_rng(0)

    def draw(power: Mapping[str, float]) -> float:
        loss = profile.loss_best + (noise.sd * rng.standard_normal() if noise else 0.0)
        multiple = _multiple(power, loss, profile.budget)
        return math.nan if multiple is None else multiple

    ends = dense.interval(draw)
    return ends if ends is not None and all(map(math.isfinite, ends)) else None


def seed_noise(points: Sequence[Point]) -> SeedNoise | None:
    """Spread over seeds, from runs that agree in all but the seed; None where no cell has two."""
    points = finished(points)
    budgets = budgets_of(points)
    cells: dict[tuple[object, ...], list[Point]] = {}
    for p in points:
        cells.setdefault((p.family, budgets[p.run], p.n_total, p.n_active, p.b, p.lr, p.d), []).append(p)
    several = {key: cell for key, cell in cells.items() if len({p.seed for p in cell}) > 1}
    if not several:
        return None
    losses = {
        f"{key[0]}, {key[1]:.2g} FLOPs, {key[3]:,.0f} active": tuple(float(p.loss or 0.0) for p in cell)
        for key, cell in several.items()
    }
    freedom = sum(len(values) - 1 for values in losses.values())
    squares = sum(float(np.var(values)) * len(values) for values in losses.values())
    return SeedNoise(math.sqrt(squares / freedom), freedom, tuple(losses.items()))
