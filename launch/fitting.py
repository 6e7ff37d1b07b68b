"""Fitting laws to points, some of them held out by a condition on columns."""

from collections.abc import Mapping, Sequence

import numpy as np

from ..base.errors import UserError
from ..scaling.fit import HUBER_DELTA, Fit, Residuals, fit
from ..scaling.laws import Array, Law
from ..scaling.points import Point, variables_of
from .condition import parse_condition

WEIGHT, DEVIATION = "weight", "sd"  # names under which points carry what --weight and --sd name
COLUMN = "column of {}"  # convention under which a fit tells which column a variable was mapped to

# What the columns of our own tables hold; see scaling/points.py.
MEANINGS = {
    "n_total": "all non-embedding parameters",
    "n_active": "non-embedding parameters that a token uses",
    "d": "training tokens seen, repetitions included",
    "c": "training FLOPs, exact: products forward and backward with attention scores, router and head",
    "e": "routed experts of a layer, shared ones not counted; 1 for a dense model",
    "k": "routed experts of a token, shared ones not counted",
    "g": "4 x model width / expert width; 1 for a dense model",
    "s": "1 - k / e over routed experts; 0 for a dense model",
    "b": "tokens in a batch",
    "lr": "peak learning rate",
}


def fit_points(
    points: Sequence[Point],
    law: Law,
    hold_out: str | None,
    bootstrap: int,
    seed: int,
    *,
    huber_delta: float = HUBER_DELTA,
    residuals: Residuals = "log",
    mapping: Mapping[str, str] | None = None,
) -> Fit:
    """Fit ``law`` to the finished points.

    Points that carry an extra `WEIGHT` or `DEVIATION` (the standard deviation of the log loss) are weighted by it.

    Args:
        hold_out: condition on columns of the points; those for which it holds are predicted, not fitted.
        mapping: variable -> the column it was taken from, for the conventions.

    Raises:
        UserError: a point lacks a variable or a weight, or there are too few points.
    """
    variables, loss, used = variables_of(points, law)
    return fit(
        law,
        variables,
        loss,
        huber_delta=huber_delta,
        residuals=residuals,
        weights=_weights(used),
        hold_out=_held_out(hold_out, used) if hold_out is not None else None,
        bootstrap=bootstrap,
        seed=seed,
        conventions=_conventions(law, used, mapping or {}),
        names=[point.run for point in used],
    )


def _conventions(law: Law, points: Sequence[Point], mapping: Mapping[str, str]) -> dict[str, str]:
    """What the law's variables are in these points."""
    stated = {}
    for name in law.variables:
        if name in mapping:
            stated[name] = f"column {mapping[name]} of the table, as counted there"
            stated[COLUMN.format(name)] = mapping[name]
        elif name == "n" and law.n_counts and points[0].n is None:
            stated[name] = MEANINGS[law.n_counts]
        elif name in MEANINGS:
            stated[name] = MEANINGS[name]
        else:
            stated[name] = f"column {name} of the table, as counted there"
    return stated


def _weights(points: Sequence[Point]) -> Array | None:
    """1 / variance, or what the table gives as weight; None where it gives neither."""
    for name in (WEIGHT, DEVIATION):
        found = [point.number(name) for point in points]
        if all(value is None for value in found):
            continue
        for point, value in zip(points, found, strict=True):
            if value is None or not 0 < value < np.inf:
                raise UserError(f"{point.run}: {name} ({value}) must be positive; leave the row out, or the option")
        values = np.array(found, dtype=float)
        return values if name == WEIGHT else values**-2
    return None


def _held_out(condition: str, points: Sequence[Point]) -> np.ndarray:
    """Which points the condition holds for."""
    parsed = parse_condition(condition)
    rows = [{name: point.number(name) for name in parsed.columns} for point in points]
    held = []
    for point, row in zip(points, rows, strict=True):
        known = {name: value for name, value in row.items() if value is not None}
        if missing := sorted(set(row) - set(known)):
            raise UserError(f"condition {condition!r}: run {point.run} has no number in column {missing[0]}")
        held.append(parsed.holds(known))
    return np.array(held)
