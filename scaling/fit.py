"""Fitting a law to points: many starts, robust, with intervals, a held-out error, and warnings in words."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..base.errors import UserError
from . import diagnosis
from .criteria import criteria
from .fitted import LEVEL, Estimate, Fit, HeldOut, Row
from .laws import Array, Law, law_named
from .solver import Solution, minimise

__all__ = ["Estimate", "Fit", "HeldOut", "fit"]

Residuals = Literal["log", "loss"]
HUBER_DELTA = 1e-3
WARM_STARTS = 3  # optima from which a bootstrap sample starts
WARM_WITHIN = 1.2  # of the best objective


def fit(
    law: str | Law,
    variables: Mapping[str, Array],
    loss: Array,
    *,
    huber_delta: float = HUBER_DELTA,
    residuals: Residuals = "log",
    weights: Array | None = None,
    hold_out: NDArray[np.bool_] | None = None,
    bootstrap: int = 0,
    seed: int = 0,
    conventions: Mapping[str, str] | None = None,
    names: Sequence[str] | None = None,
) -> Fit:
    """Fit ``law`` to points.

    Minimises the weighted sum over points of Huber's function of the residuals, from a grid of starts. The intervals
    are percentiles over resamplings of the points, each fitted from the best few optima.

    Args:
        law: a name in `laws.LAWS`, or a law.
        variables: at least the law's variables, each [n].
        loss: nats a token [n].
        huber_delta: residuals beyond it count linearly. Larger than all residuals: least squares.
        residuals: of the natural logarithm, or of the loss itself.
        weights: of the points' terms in the sum [n], such as 1 / variance; only their ratios matter. Default: equal.
        hold_out: points [n] to leave out of the fit and to predict afterwards.
        bootstrap: number of resamplings; 0: no intervals.
        seed: of the resampling.
        conventions: what n, d, c mean in these points; recorded with the result.
        names: of the points [n], under which residuals are reported; default: row numbers.

    Raises:
        UserError: unknown law, missing variable, values or weights out of range (the row is named), too few distinct
            points, or a variable that takes one value only.
    """
    if not 0 < huber_delta < np.inf:
        raise UserError(
            f"Huber's delta ({huber_delta}) must be positive; it is in units of the residuals, such as 1e-3"
        )
    law = law_named(law, variables) if isinstance(law, str) else law
    loss = np.asarray(loss, dtype=float)
    held = np.zeros(len(loss), dtype=bool) if hold_out is None else np.asarray(hold_out, dtype=bool)
    shown = names or [f"row {number}" for number in range(1, len(loss) + 1)]
    _check_loss(loss, shown)
    for name, values in variables.items():
        if len(values) != len(loss):
            raise UserError(f"variable {name} has {len(values)} rows, the loss {len(loss)}")
    logs = law.logs_of(variables, shown)
    inside = {name: values[~held] for name, values in logs.items()}
    _check_points(law, inside)
    weight = _checked_weights(weights, shown)[~held]
    weight = weight / weight.mean()

    problem = _Problem(law, inside, loss[~held], weight, residuals, huber_delta)
    starts = law.starts(inside, loss[~held])
    solution = problem.solve(starts, np.tile(weight, (len(starts), 1)))
    best = solution.theta[np.argmin(solution.objective)]
    agreeing = diagnosis.alike(solution.theta, best) & (solution.objective <= _near(solution.objective.min()))
    samples = _bootstrap(problem, solution, bootstrap, seed)

    prediction, derivative = problem.model(best[None])
    residual = prediction[0] - problem.target
    log_residual = law.evaluate(best[None], inside)[0][0] - np.log(loss[~held])
    root = np.sqrt(weight)
    told_apart = diagnosis.identifiability(law, best, root[:, None] * derivative[0])
    open_ones = diagnosis.refused(law, best, starts[agreeing], solution.theta[agreeing])
    flat = diagnosis.flat_direction(law, best, root * residual, root[:, None] * derivative[0])
    fitted = law.to_values(best)
    sampled = np.array([list(law.to_values(sample).values()) for sample in samples]).reshape(-1, len(fitted))
    estimates = _estimates(fitted, sampled, set(open_ones))
    warnings = [
        *diagnosis.units(law, variables, loss),
        *open_ones.values(),
        *diagnosis.often_on_bound(law, samples, set(open_ones)),
        *([flat] if flat else []),
        *diagnosis.weak(law, estimates),
        *diagnosis.disagreement(len(starts), int(agreeing.sum())),
        *diagnosis.duplicates(np.column_stack([*inside.values(), loss[~held]])),
    ]
    return Fit(
        law=law.name,
        variables=law.variables,
        coefficients=estimates,
        values=fitted,
        n_points=len(residual),
        rmse_log=float(np.sqrt(np.mean(log_residual**2))),
        held_out=_held_out(law, best, logs, loss, held),
        tried=len(starts),
        agreeing=int(agreeing.sum()),
        conventions=_conventions(law, huber_delta, residuals, weights is not None, bootstrap) | dict(conventions or {}),
        warnings=tuple(warnings),
        ranges={
            name: (float(np.min(ends)), float(np.max(ends)))
            for name in law.variables
            for ends in [np.asarray(variables[name], dtype=float)[~held]]
        },
        samples=sampled,
        criteria=criteria(residual, huber_delta, weight, len(law.coefficients)),
        identifiability=told_apart,
        rows=_rows(law, best, logs, loss, held, shown),
    )


@dataclass(frozen=True)
class _Problem:
    """The sum that is minimised: of a law, over the fitted points [n]."""

    law: Law
    logs: Mapping[str, Array]
    loss: Array
    weight: Array
    residuals: Residuals
    delta: float

    @property
    def target(self) -> Array:
        return np.log(self.loss) if self.residuals == "log" else self.loss

    def model(self, theta: Array) -> tuple[Array, Array]:
        """What is set against `target` [S, n], and its derivative by theta [S, n, P]."""
        prediction, derivative = self.law.evaluate(theta, self.logs)
        if self.residuals == "log":
            return prediction, derivative
        value = np.exp(prediction)
        return value, value[..., None] * derivative

    def solve(self, starts: Array, weights: Array) -> Solution:
        """From starts [S, P], each with weights of the points [S, n]."""
        low, high = self.law.bounds
        return minimise(self.model, starts, self.target, low, high, self.delta, weights)


def _near(objective: float) -> float:
    """Objectives up to here count as equal to the best one; the floor is for fits without residuals."""
    return objective * (1 + 1e-4) + 1e-20


def _check_loss(loss: Array, names: Sequence[str]) -> None:
    legal = np.isfinite(loss) & (loss > 0)
    if not legal.all():
        row = int(np.argmin(legal))
        raise UserError(f"{names[row]}: the loss ({loss[row]}) must be positive; leave the row out")


def _checked_weights(weights: Array | None, names: Sequence[str]) -> Array:
    if weights is None:
        return np.ones(len(names))
    weights = np.asarray(weights, dtype=float)
    if len(weights) != len(names):
        raise UserError(f"{len(weights)} weights are given for {len(names)} points")
    legal = np.isfinite(weights) & (weights > 0)
    if not legal.all():
        row = int(np.argmin(legal))
        raise UserError(f"{names[row]}: the weight ({weights[row]}) must be positive; leave the row out")
    return weights


def _check_points(law: Law, logs: Mapping[str, Array]) -> None:
    wanted = len(law.coefficients)
    count = len(next(iter(logs.values())))
    if count < wanted + 1:
        raise UserError(
            f"law {law.name} has {wanted} coefficients and needs at least {wanted + 1} points to fit; {count} are given"
        )
    for name, values in logs.items():
        if np.ptp(values) == 0:
            raise UserError(
                f"law {law.name}: {name} is the same in all {count} points, so its part of {law.equation} cannot be "
                "told from the rest; vary it, or fit a law without it"
            )
    distinct = len(np.unique(np.column_stack(list(logs.values())), axis=0))
    if distinct < wanted:
        raise UserError(
            f"law {law.name} has {wanted} coefficients, but the {count} points lie at only {distinct} places in "
            f"{', '.join(law.variables)}"
        )


def _bootstrap(problem: _Problem, solution: Solution, count: int, seed: int) -> Array:
    """theta of ``count`` resamplings of the points [count, P]."""
    warm = _distinct_optima(solution)
    if not count:
        return np.empty((0, warm.shape[1]))
    rng = np.random.default_rng(seed)
    places = np.unique(np.column_stack(list(problem.logs.values())), axis=0, return_inverse=True)[1].reshape(-1)
    counts = np.array([_resample(rng, places, len(problem.law.coefficients)) for _ in range(count)])
    found = problem.solve(np.tile(warm, (count, 1)), np.repeat(problem.weight * counts, len(warm), axis=0))
    chosen = found.objective.reshape(count, len(warm)).argmin(axis=1)
    return found.theta.reshape(count, len(warm), -1)[np.arange(count), chosen]


def _resample(rng: np.random.Generator, places: NDArray[np.intp], fewest: int) -> Array:
    """How often each point is drawn [n]; drawn again while too few distinct places are among them to fit a law."""
    n = len(places)
    while True:
        counts = np.bincount(rng.integers(n, size=n), minlength=n)
        if len(np.unique(places[counts > 0])) >= fewest:
            return counts.astype(float)


def _distinct_optima(solution: Solution) -> Array:
    """The best optimum and the next best different ones of nearly the same objective [at most WARM_STARTS, P]."""
    order = np.argsort(solution.objective)
    limit = WARM_WITHIN * solution.objective[order[0]]
    chosen: list[Array] = []
    for place in order:
        theta = solution.theta[place]
        if chosen and (solution.objective[place] > limit or len(chosen) == WARM_STARTS):
            break
        if not chosen or not diagnosis.alike(np.array(chosen), theta).any():
            chosen.append(theta)
    return np.array(chosen)


def _estimates(values: Mapping[str, float], samples: Array, open_ones: set[str]) -> dict[str, Estimate]:
    estimates = {}
    for place, (name, value) in enumerate(values.items()):
        if name in open_ones:
            estimates[name] = Estimate(None, None, None)
        elif len(samples):
            low, high = np.percentile(samples[:, place], LEVEL)
            estimates[name] = Estimate(value, float(low), float(high))
        else:
            estimates[name] = Estimate(value, None, None)
    return estimates


def _held_out(
    law: Law, theta: Array, logs: Mapping[str, Array], loss: Array, held: NDArray[np.bool_]
) -> HeldOut | None:
    if not held.any():
        return None
    outside = {name: values[held] for name, values in logs.items()}
    error = law.evaluate(theta[None], outside)[0][0] - np.log(loss[held])
    return HeldOut(int(held.sum()), float(np.sqrt(np.mean(error**2))), float(np.max(np.abs(np.expm1(error)))))


def _rows(
    law: Law,
    theta: Array,
    logs: Mapping[str, Array],
    loss: Array,
    held: NDArray[np.bool_],
    names: Sequence[str],
) -> tuple[Row, ...]:
    residual = law.evaluate(theta[None], logs)[0][0] - np.log(loss)
    return tuple(Row(n, float(r), bool(h)) for n, r, h in zip(names, residual, held, strict=True))


def _conventions(law: Law, delta: float, residuals: Residuals, weighted: bool, bootstrap: int) -> dict[str, str]:
    of = "natural-log residuals" if residuals == "log" else "residuals of the loss itself"
    stated = {
        "equation": law.equation,
        "source": law.paper,
        "predicts": law.quantity,
        "objective": f"{'weighted ' if weighted else ''}sum of Huber({delta:g}) of {of}",
        "intervals": f"95 %, percentiles of {bootstrap} resamplings of the points" if bootstrap else "none",
    }
    if "n" in law.variables and law.n_counts:
        stated["n"] = f"{law.n_counts.removeprefix('n_')} non-embedding parameters, unless the table says otherwise"
    return stated | {f"{name} in the paper": meaning for name, meaning in law.conventions.items()}
