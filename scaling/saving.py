"""Data saved: the share of training tokens that a dense model of equal active size would need in addition.

For a mixture with N active parameters that reaches loss L after D tokens, D_dense is the number of tokens after which
a dense model with N parameters reaches L; the data saved is 1 - D / D_dense. D_dense comes from the law
L = E + A / N^alpha + B / D^beta where the study fitted it to the dense runs alone, else from a straight line in
(log D, log L) through the dense runs of the same shape. No value where D_dense lies further than a factor of two
outside the tokens that dense runs of that size were trained on.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .cells import DENSE, Cell, cells_of
from .fitted import LEVEL, Fit
from .laws import CHINCHILLA
from .points import Point
from .seeds import SeedNoise

FURTHEST = 2.0  # factor by which D_dense may lie outside the measured tokens
SAME_SIZE = 1.25  # ratio of active parameters within which a dense model counts as of that size
DRAWS = 1000  # for the intervals of interpolations


@dataclass(frozen=True)
class Saving:
    """Data saved by one cell of a mixture.

    Attributes:
        active: active parameters.
        tokens: D.
        dense_tokens: D_dense; None where it cannot be told.
        share: 1 - D / D_dense; negative where the mixture needs more data.
        low, high: 95 % interval of ``share``.
        extrapolated: D_dense lies outside the measured tokens (by less than a factor of two).
        by_law: D_dense comes from the fitted law.
        why: why there is no value.
    """

    family: str
    budget: float
    active: float
    tokens: float
    dense_tokens: float | None
    share: float | None
    low: float | None
    high: float | None
    extrapolated: bool
    by_law: bool
    why: str

    @property
    def resolved(self) -> bool | None:
        """Whether the interval excludes 0; None without one."""
        return None if self.low is None or self.high is None else self.low > 0 or self.high < 0


def savings(points: Sequence[Point], fits: Mapping[str, Fit], noise: SeedNoise | None) -> list[Saving]:
    """Data saved by every cell of the other families, in order of appearance."""
    cells = cells_of(points)
    dense = [cell for cell in cells if cell.family == DENSE]
    if not dense:
        return []
    law = _dense_law(fits.values(), dense)
    return [_saving(cell, dense, law, noise) for cell in cells if cell.family != DENSE]


def _dense_law(fits: Iterable[Fit], dense: Sequence[Cell]) -> Fit | None:
    """The law of n and d that was fitted to dense runs and nothing else."""
    runs = {point.run for cell in dense for point in cell.runs}
    for fit in fits:
        if fit.law == CHINCHILLA.name and fit.rows and all(row.name in runs for row in fit.rows):
            return fit
    return None


def _saving(cell: Cell, dense: Sequence[Cell], law: Fit | None, noise: SeedNoise | None) -> Saving:
    active, tokens = cell.runs[0].n_active or 0.0, cell.runs[0].d or 0.0
    near = [c for c in dense if 1 / SAME_SIZE <= (c.runs[0].n_active or 0.0) / active <= SAME_SIZE]

    def result(needed: float | None, samples: Sequence[float], why: str = "", extrapolated: bool = False) -> Saving:
        if needed is None:
            return Saving(cell.family, cell.budget, active, tokens, None, None, None, None, False, law is not None, why)
        low, high = None, None
        if len(samples):
            low, high = map(float, np.percentile(1 - tokens / np.array(samples), LEVEL))
        share = 1 - tokens / needed
        return Saving(
            cell.family, cell.budget, active, tokens, needed, share, low, high, extrapolated, law is not None, why
        )

    if not near:
        return result(None, (), "no dense run of this size")
    measured = [c.runs[0].d or 0.0 for c in near]
    if law is None:
        near = [c for c in near if c.shape == cell.shape and c.shape is not None]
        measured = [c.runs[0].d or 0.0 for c in near]
        if len(set(measured)) < 2:
            return result(None, (), "fewer than two dense runs of this shape, and no law fitted to the dense runs")
        needed, samples = _by_interpolation(cell, near, noise)
    else:
        needed, samples = _by_law(cell, law, noise)
    if not min(measured) / FURTHEST <= needed <= max(measured) * FURTHEST:
        where = "more than twice the most" if needed > max(measured) else "less than half the fewest"
        return result(None, (), f"a dense model would need {where} tokens measured at this size")
    return result(needed, samples, extrapolated=not min(measured) <= needed <= max(measured))


def _seed_errors(cell: Cell, noise: SeedNoise | None, rng: np.random.Generator, count: int) -> np.ndarray:
    """Drawn errors of a cell's mean loss [count]; zeros where seed noise was not measured."""
    if noise is None:
        return np.zeros(count)
    spread = noise.of(cell.family)[1]
    return spread.sd / math.sqrt(len(cell.losses)) * rng.standard_t(spread.freedom, count)


def _by_law(cell: Cell, law: Fit, noise: SeedNoise | None) -> tuple[float, list[float]]:
    """D_dense by the law, and by its resamplings with its residual and the seed noise of the mixture's loss."""
    active = cell.runs[0].n_active or 0.0
    rng = np.random.default_rng(0)
    count = len(law.samples)
    errors = _seed_errors(cell, noise, rng, count)
    factors = np.exp(law.rmse_log * rng.standard_normal(count))
    names, mean = CHINCHILLA.names, cell.mean
    samples = [
        tokens_needed(dict(zip(names, map(float, values), strict=True)), active, (mean + error) * factor)
        for values, error, factor in zip(law.samples, errors, factors, strict=True)
    ]
    return tokens_needed(law.values, active, mean), samples


def tokens_needed(values: Mapping[str, float], n: float, loss: float) -> float:
    """Tokens after which ``L = E + A / n^alpha + B / d^beta`` reaches ``loss``; infinite where it never does."""
    left = loss - values["E"] - values["A"] / n ** values["alpha"]
    if left <= 0 or values["beta"] <= 0:
        return math.inf
    log = math.log(values["B"] / left) / values["beta"]
    return math.exp(log) if log < 700 else math.inf


def _by_interpolation(cell: Cell, dense: Sequence[Cell], noise: SeedNoise | None) -> tuple[float, list[float]]:
    """D_dense along the dense cells of the same shape, and with drawn seed noise of all losses.

    Of cells with equal tokens (and other batches or learning rates) the best one counts.
    """
    best = {c.runs[0].d or 0.0: c for c in sorted(dense, key=lambda c: -c.mean)}
    ordered = [best[tokens] for tokens in sorted(best)]
    log_d = np.log([c.runs[0].d or 1.0 for c in ordered])
    losses = np.array([c.mean for c in ordered])
    mean = cell.mean
    needed = _along(log_d, losses, mean)
    if noise is None:
        return needed, []
    rng = np.random.default_rng(0)
    errors = np.array([_seed_errors(c, noise, rng, DRAWS) for c in [*ordered, cell]])
    return needed, [_along(log_d, losses + error[:-1], max(mean + float(error[-1]), 1e-3)) for error in errors.T]


def _along(log_d: np.ndarray, losses: np.ndarray, loss: float) -> float:
    """Where straight lines through (log d, log loss) reach ``loss``; the outer ones go on beyond their ends."""
    logs = np.log(np.maximum(losses, 1e-3))
    target = math.log(loss)
    below = np.flatnonzero(logs <= target)
    after = int(np.clip(below[0], 1, len(logs) - 1)) if len(below) else len(logs) - 1
    slope = (logs[after] - logs[after - 1]) / (log_d[after] - log_d[after - 1])
    if slope >= 0:
        return math.inf
    log = log_d[after] + (target - logs[after]) / slope
    return math.exp(log) if log < 700 else math.inf
