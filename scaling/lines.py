"""Straight lines by least squares, and how far two parallel ones lie apart."""

from dataclasses import dataclass

import numpy as np

from .laws import Array
from .seeds import t_factor

FEWEST = 3  # values of each side for a distance


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
