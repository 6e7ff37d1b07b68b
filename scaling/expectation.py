"""What a fitted law expects of a run that it has not seen: a loss, and where 95 of 100 such runs would lie.

The interval of a coefficient says how well the law is known; a single run strays from the law besides. Here every
resampling of the points predicts, and is multiplied by the exponential of an error drawn from Student's t. The size
of that error is the fit's residual with its degrees of freedom, or the seed noise where that is larger (a law with
many coefficients through few points can lie closer to them than two seeds lie together).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..base.errors import UserError
from .fitted import LEVEL, Fit

DRAWS = 10  # errors drawn for each resampling


@dataclass(frozen=True)
class Expected:
    """A loss in nats a token with the 95 % interval of a new run."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Expectation:
    """What a law expects of one run.

    Attributes:
        holds: what the interval contains, in words.
        warnings: variables outside the fitted ranges.
    """

    loss: Expected
    holds: str
    warnings: tuple[str, ...]


def expect(fit: Fit, variables: Mapping[str, float], seed_sd: float | None = None) -> Expectation:
    """What ``fit`` expects of a run at ``variables``.

    Args:
        seed_sd: standard deviation of a run's loss over seeds, nats a token; None: not measured.

    Raises:
        UserError: the fit has no resamplings, or a variable is missing or out of range.
    """
    if not len(fit.samples):
        raise UserError(
            "the fit has no resamplings, so a prediction from it has no interval; fit again with --bootstrap 400"
        )
    arrays = {name: np.array([value], dtype=float) for name, value in variables.items()}
    law = fit.as_law()
    value = float(law.predict(fit.values, arrays)[0])
    names = law.names
    predicted = [law.predict(dict(zip(names, map(float, sample), strict=True)), arrays)[0] for sample in fit.samples]
    freedom = fit.n_points - len(names)
    residual = fit.rmse_log * math.sqrt(fit.n_points / freedom)
    seed = (seed_sd or 0.0) / value
    rng = np.random.default_rng(0)
    if seed > residual:
        errors = seed * rng.standard_normal((DRAWS, len(predicted)))
        source = f"seed noise ({seed:.2%} of the loss, more than the residual of {residual:.2%})"
    else:
        errors = residual * rng.standard_t(freedom, (DRAWS, len(predicted)))
        source = f"the residual ({residual:.2%} of the loss, Student's t with {freedom} degrees of freedom)"
    low, high = np.percentile(np.array(predicted) * np.exp(np.clip(errors, -50, 50)), LEVEL)
    holds = f"95 % of new runs: {len(predicted)} resamplings of the points, each with an error of the size of {source}"
    return Expectation(Expected(value, float(low), float(high)), holds, tuple(outside(fit, variables)))


def outside(fit: Fit, variables: Mapping[str, float]) -> list[str]:
    """Variables beyond those fitted, each with the factor, in words."""
    warnings = []
    for name, value in variables.items():
        low, high = fit.ranges[name]
        if low <= value <= high:
            continue
        place = f"{name} = {value:.3g} is {{}} the fitted range ({low:.3g} to {high:.3g})"
        nearest = high if value > high else low
        factor = value / nearest if value > high else nearest / max(value, 1e-300)
        side = "above" if value > high else "below"
        far = f"{factor:.3g} x {side}" if nearest > 0 and value > 0 else side  # a sparsity may be 0
        warnings.append(place.format(far))
    return warnings
