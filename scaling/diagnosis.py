"""What a fit does not tell: coefficients that the data left open, and why, in words."""

import numpy as np
from numpy.typing import NDArray

from .laws import Array, Law

Mask = NDArray[np.bool_]

SAME = 0.01  # relative (exponents below 1: absolute) difference under which coefficients count as the same
FEW_AGREE = 2
OFTEN = 0.05  # share of bootstrap samples on a bound that is worth a warning
SHOWN = 0.2  # of the largest part of a flat direction: smaller parts are not named


def alike(theta: Array, reference: Array) -> Mask:
    """Which rows of theta [S, P] equal ``reference`` [P] within `SAME`."""
    return np.asarray(np.all(np.abs(theta - reference) <= SAME * np.maximum(1.0, np.abs(reference)), axis=1))


def on_bound(law: Law, theta: Array) -> Mask:
    """Which coefficients lie on a bound, for theta [..., P]."""
    low, high = law.bounds
    near = 1e-6 * np.maximum(1.0, high - low)
    touching: Mask = (theta - low <= near) | (high - theta <= near)
    return touching


def refused(law: Law, best: Array, starts: Array, ends: Array) -> dict[str, str]:
    """Coefficients that must not be presented as fitted, each with the reason.

    Args:
        best: the optimum [P].
        starts, ends: where the agreeing starts began and ended [A, P].
    """
    never_moved = np.all(np.abs(ends - starts) <= 1e-9 * np.maximum(1.0, np.abs(starts)), axis=0)
    values = law.to_values(best)
    reasons = {}
    for place, (name, bound) in enumerate(zip(law.names, on_bound(law, best), strict=True)):
        if bound:
            reasons[name] = f"{name} ran to its bound {values[name]:.3g}: the data do not determine it"
        elif never_moved[place]:
            reasons[name] = f"{name} never left its start value {values[name]:.3g}: the data do not determine it"
    return reasons


def flat_direction(law: Law, best: Array, residual: Array, derivative: Array) -> str | None:
    """The worst determined combination of coefficients, if it is uncertain by more than itself.

    Linearised at the optimum: the standard error along the flattest direction, with scales measured by their
    logarithm and exponents by their own size.

    Args:
        residual: of the fitted points [n].
        derivative: of the log loss by theta [n, P].
    """
    free = ~on_bound(law, best)
    unit = np.array(
        [1.0 if c.kind == "scale" else max(abs(value), 0.05) for c, value in zip(law.coefficients, best, strict=True)]
    )[free]
    _, singular, directions = np.linalg.svd(derivative[:, free] * unit, full_matrices=False)
    spread = float(np.sqrt(np.sum(residual**2) / max(len(residual) - int(free.sum()), 1)))
    smallest = max(float(singular[-1]), 1e-300)
    error = spread / smallest
    undetermined = smallest <= 1e-10 * float(singular[0])
    if error <= 1 and not undetermined:
        return None
    shift = directions[-1] * unit * (1.0 if undetermined else min(error, 3.0))
    largest = np.abs(directions[-1]).max()
    coefficients = [c for c, is_free in zip(law.coefficients, free, strict=True) if is_free]
    parts = [
        f"{c.name} x {np.exp(by):.2g}" if c.kind == "scale" else f"{c.name} {by:+.2g}"
        for c, by, part in zip(coefficients, shift, directions[-1], strict=True)
        if abs(part) >= SHOWN * largest
    ]
    if len(parts) == 1:
        return f"flat direction: {parts[0]} would fit about as well"
    return f"flat direction: {', '.join(parts)} together would fit about as well; do not read these one by one"


def often_on_bound(law: Law, samples: Array, skip: set[str]) -> list[str]:
    """Coefficients that run to a bound in many bootstrap samples [K, P] (theta)."""
    if not len(samples):
        return []
    shares = on_bound(law, samples).mean(axis=0)
    return [
        f"{name} runs to a bound in {share:.0%} of the bootstrap samples: its interval is only a bound"
        for name, share in zip(law.names, shares, strict=True)
        if share > OFTEN and name not in skip
    ]


def disagreement(tried: int, agreeing: int) -> list[str]:
    if agreeing >= FEW_AGREE:
        return []
    return [f"only {agreeing} of {tried} starts reached the best optimum: it may not be the global one"]


def duplicates(columns: Array) -> list[str]:
    """Points that agree in all variables and the loss [n, V + 1]."""
    extra = len(columns) - len(np.unique(columns, axis=0))
    return [f"{extra} points stand more than once, equal in every variable and the loss"] if extra else []
