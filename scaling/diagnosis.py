"""What a fit does not tell: coefficients that the data left open, and why, in words."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from .fitted import Estimate, Identifiability
from .laws import Array, Law

Mask = NDArray[np.bool_]

SAME = 0.01  # relative (exponents below 1: absolute) difference under which coefficients count as the same
FEW_AGREE = 2
OFTEN = 0.05  # share of bootstrap samples on a bound that is worth a warning
SPAN = 5.0  # ratio of an interval's ends from which a factor is weakly identified
SHOWN = 0.2  # of the largest part of a flat direction: smaller parts are not named
CORRELATED = 0.95  # size of a correlation from which a pair is named
SMALLEST = {"n": 1e3, "n_total": 1e3, "n_active": 1e3, "d": 1e4, "c": 1e6}  # below: not counts of single ones
LARGEST_LOSS = 20.0  # nats a token: more than any vocabulary in use gives by guessing


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


def identifiability(law: Law, best: Array, derivative: Array) -> Identifiability:
    """Condition number and strongly correlated pairs among the coefficients that lie on no bound.

    Args:
        derivative: of log L by theta [n, P], each row times the root of its point's weight.
    """
    free = ~on_bound(law, best)
    names = [name for name, is_free in zip(law.names, free, strict=True) if is_free]
    length = np.sqrt(np.sum(derivative[:, free] ** 2, axis=0))
    _, singular, directions = np.linalg.svd(derivative[:, free] / np.maximum(length, 1e-300), full_matrices=False)
    if not len(singular) or singular[-1] <= 1e-14 * singular[0]:
        return Identifiability(None, ())
    covariance = (directions.T / singular**2) @ directions
    size = np.sqrt(np.diag(covariance))
    correlation = covariance / np.outer(size, size)
    pairs = [
        (names[i], names[j], round(float(correlation[i, j]), 4))
        for i in range(len(names))
        for j in range(i)
        if abs(correlation[i, j]) > CORRELATED
    ]
    pairs.sort(key=lambda pair: -abs(pair[2]))
    return Identifiability(float(singular[0] / singular[-1]), tuple((b, a, value) for a, b, value in pairs))


def units(law: Law, variables: Mapping[str, Array], loss: Array) -> list[str]:
    """Variables too small to be counts of parameters, tokens or FLOPs, and losses too large to be nats a token."""
    warnings = []
    for name, smallest in SMALLEST.items():
        if name in law.variables and np.max(variables[name]) < smallest:
            low, high = np.min(variables[name]), np.max(variables[name])
            warnings.append(
                f"{name} runs from {low:.3g} to {high:.3g}: single parameters, tokens or FLOPs are meant; in "
                "millions or billions, coefficients and budgets come out in other units"
            )
    if "nats" in law.quantity and np.max(loss) > LARGEST_LOSS:
        warnings.append(f"the loss goes up to {np.max(loss):.3g}: nats a token are meant, no perplexity")
    return warnings


def flat_direction(law: Law, best: Array, residual: Array, derivative: Array) -> str | None:
    """The worst determined combination of coefficients, if it is uncertain by more than itself.

    Linearised at the optimum: the standard error along the flattest direction, with scales measured by their
    logarithm and exponents by their own size.

    Args:
        residual: of the fitted points [n], times the root of the point's weight.
        derivative: of the log loss by theta [n, P], likewise.
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


def weak(law: Law, estimates: Mapping[str, Estimate]) -> list[str]:
    """Coefficients whose interval says little: factors known to no better than `SPAN`, exponents without a sign."""
    warnings = []
    for coefficient in law.coefficients:
        low, high = estimates[coefficient.name].low, estimates[coefficient.name].high
        if low is None or high is None:
            continue
        if coefficient.kind == "scale" and high > SPAN * low:
            warnings.append(
                f"{coefficient.name} is only weakly identified: its interval spans a factor of {high / low:.2g}"
            )
        elif coefficient.kind == "exponent" and low < 0 < high:
            warnings.append(f"{coefficient.name} may be 0: its interval holds both signs")
    return warnings


def disagreement(tried: int, agreeing: int) -> list[str]:
    if agreeing >= FEW_AGREE:
        return []
    return [f"only {agreeing} of {tried} starts reached the best optimum: it may not be the global one"]


def duplicates(columns: Array) -> list[str]:
    """Points that agree in all variables and the loss [n, V + 1]."""
    extra = len(columns) - len(np.unique(columns, axis=0))
    return [f"{extra} points stand more than once, equal in every variable and the loss"] if extra else []
