"""What `bench fit` measures: the fitter, the loop that one would write without it, and its evaluations alone."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from ..scaling.fit import HUBER_DELTA, fit
from ..scaling.laws import CHINCHILLA, Array, SumOfPowers
from ..scaling.solver import huber

TRUTH = {"E": 1.69, "A": 406.4, "alpha": 0.34, "B": 410.7, "beta": 0.28}
NOISE = 0.005  # standard deviation of the log loss
LEVEL = (2.5, 97.5)
MAGNIFIED = 1e3  # L-BFGS-B's tolerances are meant for objectives of about 1


class _Fitter(ABC):
    """Made-up runs with N and D over three decades each."""

    bytes_moved: int | None = None

    def __init__(self, points: int, resamples: int):
        rng = np.random.default_rng(0)
        self.resamples = resamples
        self.variables = {"n": np.exp(rng.uniform(16, 23, points)), "d": np.exp(rng.uniform(21, 28, points))}
        clean = CHINCHILLA.predict(TRUTH, self.variables)
        self.loss = clean * np.exp(NOISE * rng.standard_normal(points))

    def warm_up(self) -> str:
        self.step()
        return self.note()

    @abstractmethod
    def step(self) -> None: ...

    @abstractmethod
    def note(self) -> str: ...

    def close(self) -> None:  # noqa: B027 (nothing is open)
        """Part of a `Stepper`."""


class Batch(_Fitter):
    """Ours: all starts, then all resamples, advance together."""

    def step(self) -> None:
        self.found = fit(CHINCHILLA, self.variables, self.loss, bootstrap=self.resamples)

    def note(self) -> str:
        beta = self.found.coefficients["beta"]
        return f"beta {beta.value:.4f}, 95 % {beta.low:.4f} to {beta.high:.4f}"


class ScipyLoop(_Fitter):
    """A start after the other, then a resample after the other from the best optimum, with the exact gradient."""

    def step(self) -> None:
        logs = CHINCHILLA.logs_of(self.variables)
        everyone = np.arange(len(self.loss))
        starts = CHINCHILLA.starts(logs, self.loss)
        best = min((self._fit(start, everyone) for start in starts), key=lambda found: found[0])[1]
        rng = np.random.default_rng(0)
        drawn = (rng.integers(len(everyone), size=len(everyone)) for _ in range(self.resamples))
        self.best, self.samples = best, np.array([self._fit(best, rows)[1] for rows in drawn])

    def _fit(self, start: Array, rows: NDArray[np.intp]) -> tuple[float, Array]:
        log_n, log_d = np.log(self.variables["n"][rows]), np.log(self.variables["d"][rows])
        target = np.log(self.loss[rows])

        def objective(theta: Array) -> tuple[float, Array]:
            e, a, alpha, b, beta = theta
            terms = np.stack([np.full_like(log_n, e), a - alpha * log_n, b - beta * log_d])
            top = terms.max(axis=0)
            parts = np.exp(terms - top)
            total = parts.sum(axis=0)
            residual = top + np.log(total) - target
            pull = np.clip(residual, -HUBER_DELTA, HUBER_DELTA)
            of_e, of_a, of_b = parts / total * pull
            gradient = np.array([of_e.sum(), of_a.sum(), -(of_a * log_n).sum(), of_b.sum(), -(of_b * log_d).sum()])
            return MAGNIFIED * float(huber(residual, HUBER_DELTA).sum()), MAGNIFIED * gradient

        box = list(zip(*CHINCHILLA.bounds, strict=True))
        options = {"maxiter": 3000, "ftol": 1e-12, "gtol": 1e-8}
        found = minimize(objective, start, jac=True, method="L-BFGS-B", bounds=box, options=options)
        return float(found.fun), found.x

    def note(self) -> str:
        low, high = np.percentile(self.samples[:, -1], LEVEL)
        return f"beta {self.best[-1]:.4f}, 95 % {low:.4f} to {high:.4f}"


@dataclass(frozen=True)
class _Counted(SumOfPowers):
    """Remembers for how many theta at once it was evaluated."""

    calls: list[int] = field(default_factory=list)

    def evaluate(self, theta: Array, logs: Mapping[str, Array]) -> tuple[Array, Array]:
        self.calls.append(len(theta))
        return super().evaluate(theta, logs)


class Evaluations(_Fitter):
    """The evaluations of the law that ours makes, in its batches."""

    def __init__(self, points: int, resamples: int):
        super().__init__(points, resamples)
        counted = _Counted(**{one.name: getattr(CHINCHILLA, one.name) for one in fields(CHINCHILLA)})
        fit(counted, self.variables, self.loss, bootstrap=resamples)
        self.calls = counted.calls
        self.logs = CHINCHILLA.logs_of(self.variables)
        self.theta = np.tile(CHINCHILLA.to_theta(TRUTH), (max(self.calls), 1))

    def step(self) -> None:
        for size in self.calls:
            CHINCHILLA.evaluate(self.theta[:size], self.logs)

    def note(self) -> str:
        return f"{sum(self.calls)} evaluations of the law and its derivative in {len(self.calls)} batches"
