"""Straight lines by least squares: power laws through optima, and how far two parallel lines lie apart."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .fitted import Estimate
from .laws import Array
from .seeds import t_factor

FEWEST = 3  # values of each side for a distance, and for a power law


@dataclass(frozen=True)
class Distance:
    """How far the second of two parallel lines lies above the first.

    Attributes:
        reach: half of a 95 % interval: Student's t from the residuals.
        n: values that it rests on, of both sides.
        span: of x, that both sides pass through.
    """

    value: float
    reach: float
    n: int
    span: tuple[float, float]


def distance(x: Array, y: Array, other_x: Array, other_y: Array) -> Distance | None:
    """From (x, y) [n] to the other values [m], where both have x; None where too few are left there."""
    if not len(x) or not len(other_x):
        return None
    low, high = max(x.min(), other_x.min()), min(x.max(), other_x.max())
    here, there = (x >= low) & (x <= high), (other_x >= low) & (other_x <= high)
    if min(here.sum(), there.sum()) < FEWEST:
        return None
    all_x, all_y = np.concatenate([x[here], other_x[there]]), np.concatenate([y[here], other_y[there]])
    other = np.concatenate([np.zeros(here.sum()), np.ones(there.sum())])
    values, errors, factor = regression(np.column_stack([np.ones_like(all_x), all_x - all_x.mean(), other]), all_y)
    return Distance(float(values[2]), factor * float(errors[2]), len(all_x), (float(low), float(high)))


def regression(design: Array, y: Array) -> tuple[Array, Array, float]:
    """Least squares of y [n] on design [n, k]: coefficients [k], standard errors [k], t of a 95 % interval."""
    values, *_ = np.linalg.lstsq(design, y, rcond=None)
    freedom = len(y) - design.shape[1]
    square = float(np.sum((y - design @ values) ** 2)) / freedom
    errors: Array = np.sqrt(square * np.diag(np.linalg.pinv(design.T @ design)))
    return np.asarray(values, dtype=float), errors, t_factor(freedom)


@dataclass(frozen=True)
class PowerLine:
    """``y = scale * x^power`` through a few values, with the uncertainty of both.

    Attributes:
        power: with its 95 % interval: Student's t.
        n: values that it goes through.
        freedom: degrees of freedom behind the intervals.
        span: of x.
        told: where the size of the errors comes from, in words.
        center: mean of ln x by weight; ``height`` is ln y there.
        height_variance, power_variance: of the line at its center and of its slope; independent.
    """

    power: Estimate
    n: int
    freedom: float
    span: tuple[float, float]
    told: str
    center: float
    height: float
    height_variance: float
    power_variance: float

    def at(self, x: float) -> Estimate:
        """y of the line at ``x`` with its 95 % interval."""
        assert self.power.value is not None
        away = math.log(x) - self.center
        log_y = self.height + self.power.value * away
        reach = t_factor(self.freedom) * math.sqrt(self.height_variance + away**2 * self.power_variance)
        low, value, high = (math.exp(min(max(log, -600.0), 600.0)) for log in (log_y - reach, log_y, log_y + reach))
        return Estimate(value, low, high)

    def beyond(self, x: float) -> float:
        """How many times ``x`` lies outside the values that the line goes through; 1 inside."""
        low, high = self.span
        return max(x / high, low / x, 1.0)


def power_line(
    x: Sequence[float], y: Sequence[float], errors: Sequence[float] | None = None, freedom: int = 0
) -> PowerLine | None:
    """A power law through values [n] of y at x; None with fewer than three distinct x.

    Args:
        errors: standard deviations of ln y from seed noise [n], which weigh the values; None: not measured, so they
            weigh alike and the residuals alone tell how large the errors are.
        freedom: degrees of freedom of the deviation over seeds behind ``errors``.
    """
    if len(set(x)) < FEWEST:
        return None
    log_x, log_y = np.log(x), np.log(y)
    known = errors is not None and min(errors) > 0
    unit = np.array(errors, dtype=float) if known else np.ones(len(log_x))
    extra = freedom if known else 0
    weight = unit**-2
    center = float(np.average(log_x, weights=weight))
    height = float(np.average(log_y, weights=weight))
    spread = float(np.sum(weight * (log_x - center) ** 2))
    slope = float(np.sum(weight * (log_x - center) * log_y)) / spread
    residual = (log_y - height - slope * (log_x - center)) / unit
    total = len(log_x) - 2 + extra
    square = (float(np.sum(residual**2)) + extra) / total
    reach = t_factor(total) * math.sqrt(square / spread)
    return PowerLine(
        power=Estimate(slope, slope - reach, slope + reach),
        n=len(log_x),
        freedom=total,
        span=(float(min(x)), float(max(x))),
        told="residuals and seed noise together" if known else "residuals alone, seed noise not being measured",
        center=center,
        height=height,
        height_variance=square / float(weight.sum()),
        power_variance=square / spread,
    )
