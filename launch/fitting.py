"""Fitting a law to points, some of them held out by a condition on columns."""

from collections.abc import Sequence

import numpy as np

from ..base.errors import UserError
from ..scaling.fit import Fit, fit
from ..scaling.laws import Law
from ..scaling.points import Point, variables_of
from .condition import parse_condition


def fit_points(points: Sequence[Point], law: Law, hold_out: str | None, bootstrap: int, seed: int) -> Fit:
    """Fit ``law`` to the finished points.

    Args:
        hold_out: condition on columns of the points; those for which it holds are predicted, not fitted.

    Raises:
        UserError: a point lacks a variable, or there are too few points.
    """
    variables, loss, used = variables_of(points, law)
    held = _held_out(hold_out, used) if hold_out is not None else None
    return fit(law, variables, loss, hold_out=held, bootstrap=bootstrap, seed=seed, names=[point.run for point in used])


def _held_out(condition: str, points: Sequence[Point]) -> np.ndarray:
    """Which points the condition holds for."""
    parsed = parse_condition(condition)
    for name in sorted(parsed.columns):
        for point in points:
            if not isinstance(getattr(point, name, None), int | float):
                raise UserError(f"condition {condition!r}: run {point.run} has no number in column {name}")
    return np.array([parsed.holds({name: getattr(point, name) for name in parsed.columns}) for point in points])
