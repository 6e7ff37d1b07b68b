"""Comparing laws fitted to the same points: held-out error first, information criteria beside it.

The criteria need a likelihood. Minimising a sum of Huber's function is maximum likelihood for the density
``exp(-rho(r) / s) / Z(s)``, normal within delta and exponential beyond; its dispersion s is one more parameter,
found by maximum likelihood too.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import erf, stdtrit

from .fitted import Criteria, Fit
from .laws import Array
from .solver import huber

SUPPORTED = 4.0  # AICc within this of the best has considerable support (Burnham and Anderson 2002, section 2.6)
FEWEST = 3  # held-out points below which a paired difference has no interval
DISPERSION = (-80.0, 20.0)  # of log s


def criteria(residual: Array, delta: float, weights: Array, coefficients: int) -> Criteria:
    """AICc and BIC of a fit.

    Args:
        residual: of the fitted points, natural log [n].
        weights: of the points [n]; a point of weight w has dispersion s / w.
        coefficients: of the law; the dispersion is counted besides.
    """
    penalty = weights * huber(residual, delta)

    def negative(log_s: float) -> float:
        s = math.exp(log_s)
        return float(penalty.sum() / s + np.log(_normaliser(s / weights, delta)).sum())

    found = float(minimize_scalar(negative, bounds=DISPERSION, method="bounded", options={"xatol": 1e-10}).fun)
    n, k = len(residual), coefficients + 1
    correction = 2 * k * (k + 1) / (n - k - 1) if n > k + 1 else None
    aicc = None if correction is None else 2 * k + 2 * found + correction
    return Criteria(aicc, k * math.log(n) + 2 * found)


def _normaliser(s: Array, delta: float) -> Array:
    """Integral of exp(-rho(r) / s) over all r."""
    inside = np.sqrt(2 * np.pi * s) * erf(delta / np.sqrt(2 * s))
    return np.asarray(inside + 2 * s / delta * np.exp(-(delta**2) / (2 * s)))


@dataclass(frozen=True)
class Contest:
    """Laws in order, best first, and what can be said about the order.

    Attributes:
        ahead: AICc over the smallest one [law]; None where too few points were fitted for it.
    """

    fits: tuple[Fit, ...]
    ahead: tuple[float | None, ...]
    sentences: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """The content of ``moescale fit --compare --json``."""
        return {"laws": [fit.as_json() for fit in self.fits], "sentences": list(self.sentences)}


def compare(fits: Sequence[Fit]) -> Contest:
    """Order laws by their error on held-out points, or by AICc where none were held out.

    Args:
        fits: of two laws or more, to the same points.
    """
    held = all(fit.held_out for fit in fits)
    ordered = sorted(fits, key=_held_error if held else _aicc)
    finite = [fit.criteria.aicc for fit in ordered if fit.criteria.aicc is not None]
    ahead = tuple(None if fit.criteria.aicc is None else fit.criteria.aicc - min(finite) for fit in ordered)
    sentences = [_by_held_out(ordered[0], ordered[1])] if held else ["no point was held out: nothing is predicted here"]
    sentences.append(_by_aicc(sorted(fits, key=_aicc)))
    if held and finite and min(fits, key=_aicc) is not ordered[0]:
        sentences.append("the two orders differ: what fits best does not predict best")
    return Contest(tuple(ordered), ahead, tuple(sentences))


def _held_error(fit: Fit) -> float:
    return fit.held_out.rmse_log if fit.held_out else math.inf


def _aicc(fit: Fit) -> float:
    return math.inf if fit.criteria.aicc is None else fit.criteria.aicc


def _by_held_out(first: Fit, second: Fit) -> str:
    """The best two, by a paired t-test on squared errors of the same points."""
    error = f"held out: {first.law} predicts best ({_held_error(first):.2%}), then {second.law} "
    error += f"({_held_error(second):.2%})"
    squares = [np.array([row.residual for row in fit.rows if row.held]) ** 2 for fit in (first, second)]
    gain = squares[1] - squares[0]
    if len(gain) < FEWEST:
        return f"{error}; not resolved: {len(gain)} held-out points are too few"
    reach = float(stdtrit(len(gain) - 1, 0.975)) * float(gain.std(ddof=1)) / math.sqrt(len(gain))
    if float(gain.mean()) > reach:
        return f"{error}; resolved at 95 % by the paired squared errors of {len(gain)} points"
    return f"{error}; not resolved: the paired squared errors of {len(gain)} points differ by less than their scatter"


def _by_aicc(ordered: Sequence[Fit]) -> str:
    first, second = ordered[:2]
    if first.criteria.aicc is None:
        return "AICc: too few points for so many coefficients"
    if second.criteria.aicc is None:
        return f"AICc: only {first.law} has few enough coefficients for the points"
    gap = second.criteria.aicc - first.criteria.aicc
    verdict = "" if gap > SUPPORTED else f"; not resolved, since {second.law} is within {SUPPORTED:g}"
    return f"AICc: {first.law} is ahead of {second.law} by {gap:.1f}{verdict}"
