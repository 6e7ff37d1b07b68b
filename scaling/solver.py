"""Robust nonlinear least squares from many starts at once.

The objective is the SUM over points of Huber's function of the residual log(prediction) - log(loss). (A mean has
gradients smaller by the number of points, and stopped a well-known fit early.) All starts, and all bootstrap
samples, advance together as one batch of damped Newton steps in numpy.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Model = Callable[[Array], tuple[Array, Array]]  # theta [S, P] -> log prediction [S, n], derivative [S, n, P]

MAX_STEPS = 1000
LARGEST_BATCH = 4_000_000  # numbers in one derivative array
GIVE_UP = 1e12  # damping beyond which no step can improve the objective any more
SETTLED = 1e-12  # relative gain of an undamped step below which a start has arrived
EXACT = 1e-24  # objective of a fit without any residual, within rounding
RIDGE = 1e-12  # of the scaled Hessian, against exactly flat directions
TINY = 1e-200


@dataclass(frozen=True)
class Solution:
    """Where the batch ended: theta [S, P], objective [S]."""

    theta: Array
    objective: Array


def huber(residual: Array, delta: float) -> Array:
    """r^2 / 2 within delta, delta (|r| - delta / 2) beyond."""
    size = np.abs(residual)
    return np.where(size <= delta, residual**2 / 2, delta * (size - delta / 2))


def minimise(
    model: Model, starts: Array, target: Array, low: Array, high: Array, delta: float, weights: Array | None = None
) -> Solution:
    """Minimise ``sum_i weight_i huber(model_i - target_i)`` within bounds from every start.

    Args:
        starts: [S, P], within the bounds.
        target: log losses [n].
        low, high: bounds [P].
        delta: Huber's delta, in units of log loss.
        weights: of the points for each start [S, n]; default: 1.
    """
    if weights is None:
        weights = np.ones((len(starts), len(target)))
    size = max(LARGEST_BATCH // (len(target) * starts.shape[1]), 1)
    parts = [
        _minimise_batch(model, starts[i : i + size], target, low, high, delta, weights[i : i + size])
        for i in range(0, len(starts), size)
    ]
    return Solution(np.concatenate([p.theta for p in parts]), np.concatenate([p.objective for p in parts]))


def _minimise_batch(
    model: Model, starts: Array, target: Array, low: Array, high: Array, delta: float, weights: Array
) -> Solution:
    theta = starts.copy()
    prediction, derivative = model(theta)
    residual = prediction - target
    objective = (weights * huber(residual, delta)).sum(axis=1)
    damping = np.ones(len(theta))
    running = np.arange(len(theta))
    for _ in range(MAX_STEPS):
        step = _newton_step(theta[running], residual, derivative, weights[running], damping[running], low, high, delta)
        proposal = np.clip(theta[running] + step, low, high)
        with np.errstate(over="ignore", invalid="ignore"):  # a step too far is not better, hence not taken
            prediction, new_derivative = model(proposal)
            new_residual = prediction - target
            new_objective = (weights[running] * huber(new_residual, delta)).sum(axis=1)
        old_objective = objective[running]
        better = new_objective < old_objective
        settled = better & (old_objective - new_objective <= SETTLED * old_objective) & (damping[running] <= 1e-3)
        theta[running[better]] = proposal[better]
        objective[running[better]] = new_objective[better]
        worse = ~better  # seldom many, and the derivatives are the largest arrays
        new_residual[worse], new_derivative[worse] = residual[worse], derivative[worse]
        residual, derivative = new_residual, new_derivative
        damping[running] = np.maximum(damping[running] * np.where(better, 0.2, 5.0), 1e-9)
        going = ~settled & (damping[running] < GIVE_UP) & (objective[running] > EXACT)
        if not going.all():
            running, residual, derivative = running[going], residual[going], derivative[going]
        if not len(running):
            break
    return Solution(theta, objective)


def _newton_step(
    theta: Array, residual: Array, derivative: Array, weights: Array, damping: Array, low: Array, high: Array,
    delta: float,
) -> Array:  # fmt: skip
    """One step [S, P] of Newton's method on Huber's objective, damped by its quadratic upper bound.

    The curvature of Huber's function is 1 within delta and 0 beyond: a Newton step with it converges fast, but too
    few points within delta make it singular. The upper bound with weights min(1, delta / |r|) is never singular and
    always descends, but slowly. Their sum, with the bound scaled by a damping that falls on success and rises on
    failure, has the virtues of both. Coefficients that lie on a bound and are pushed outward stay where they are.
    """
    size = np.abs(residual)
    bound = weights * (delta / np.maximum(size, delta))
    curvature = weights * (size <= delta) + damping[:, None] * bound
    gradient = np.einsum("sn,snp->sp", bound * residual, derivative)
    hessian = np.swapaxes(derivative * curvature[..., None], 1, 2) @ derivative
    stuck = ((theta <= low) & (gradient > 0)) | ((theta >= high) & (gradient < 0))
    diagonal = np.einsum("spp->sp", hessian)
    scale = np.where(stuck, 1.0, np.sqrt(np.maximum(diagonal, TINY)))
    hessian = hessian / (scale[:, :, None] * scale[:, None, :])
    hessian[stuck[:, :, None] | stuck[:, None, :]] = 0.0
    np.einsum("spp->sp", hessian)[...] += np.where(stuck, 1.0, RIDGE)
    gradient = np.where(stuck, 0.0, gradient) / scale
    return -np.linalg.solve(hessian, gradient[..., None])[..., 0] / scale
