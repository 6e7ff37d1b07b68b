"""What every law is: a function of a run's variables whose logarithm and derivative the fitter can ask for.

Coefficients have the names used in docs/laws.md. A "scale" is positive and fitted as its logarithm; an "exponent" is
fitted as it is. ``theta`` is the vector of fitted values, ``[..., P]``.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ...base.errors import UserError

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Coefficient:
    """A coefficient's name, kind, bounds and the values from which fits start.

    Attributes:
        starts: empty where linear least squares finds the start, given the coefficients that have some.
    """

    name: str
    kind: Literal["scale", "exponent"]
    low: float
    high: float
    starts: tuple[float, ...] = ()


def scale(name: str, low: float = 1e-6, high: float = 1e30) -> Coefficient:
    """A positive factor that enters linearly once the exponents are known."""
    return Coefficient(name, "scale", low, high)


def offset(name: str) -> Coefficient:
    """The loss that no amount of anything removes, in nats a token."""
    return Coefficient(name, "scale", 1e-4, 1e2)


def exponent(name: str, *starts: float, low: float = 0.0, high: float = 4.0) -> Coefficient:
    return Coefficient(name, "exponent", low, high, starts)


@dataclass(frozen=True)
class Reported:
    """Coefficients as somebody published them: a line to compare with, never a default.

    Attributes:
        of: what they were fitted to.
        values: by name; what was not reported is absent.
        sure: whether they were read in the paper itself, in somebody's notes on it, or are remembered.
    """

    of: str
    values: Mapping[str, float]
    sure: Literal["read in the paper", "second-hand", "remembered"]


@dataclass(frozen=True)
class Law(ABC):
    """A law.

    Attributes:
        name: as in ``moescale fit --law``.
        paper: where it comes from, with the number of the equation where known.
        equation: for people.
        variables: names of what it is a function of, as in points tables.
        coefficients: in the order of ``theta``.
        n_counts: the column of a points table that the law's n means, if it has an n.
        quantity: what it predicts.
        conventions: how the paper counts what it calls by these names, where that is known.
        reported: published coefficients.
    """

    name: str
    paper: str
    equation: str
    variables: tuple[str, ...]
    coefficients: tuple[Coefficient, ...]
    n_counts: Literal["n_total", "n_active"] | None = None
    quantity: str = "loss, nats a token"
    conventions: Mapping[str, str] = field(default_factory=dict)
    reported: tuple[Reported, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(coefficient.name for coefficient in self.coefficients)

    @property
    def bounds(self) -> tuple[Array, Array]:
        """Lower and upper bounds of theta, each [P]."""
        low = self.to_theta({c.name: c.low for c in self.coefficients})
        return low, self.to_theta({c.name: c.high for c in self.coefficients})

    def to_theta(self, values: Mapping[str, float]) -> Array:
        """Coefficients by name -> theta [P]."""
        return np.array([np.log(values[c.name]) if c.kind == "scale" else values[c.name] for c in self.coefficients])

    def to_values(self, theta: Array) -> dict[str, float]:
        """theta [P] -> coefficients by name."""
        return {
            c.name: float(np.exp(t) if c.kind == "scale" else t) for c, t in zip(self.coefficients, theta, strict=True)
        }

    @abstractmethod
    def evaluate(self, theta: Array, logs: Mapping[str, Array]) -> tuple[Array, Array]:
        """log L [S, n] and its derivative by theta [S, n, P], for theta [S, P] and `logs_of` the variables."""

    @abstractmethod
    def starts(self, logs: Mapping[str, Array], loss: Array) -> Array:
        """Where fits start: theta [S, P]."""

    def predict(self, values: Mapping[str, float], variables: Mapping[str, Array]) -> Array:
        """What the law predicts [n] (`quantity`), from coefficients by name and variables [n]."""
        return np.exp(self.evaluate(self.to_theta(values)[None], self.logs_of(variables))[0][0])

    def logs_of(self, variables: Mapping[str, Array], rows: Sequence[str] | None = None) -> dict[str, Array]:
        """Logarithms of the law's variables; sparsity s enters as log(1 - s) under the name ``1-s``.

        Args:
            rows: names of the points [n], for messages; default: row numbers.

        Raises:
            UserError: a variable is missing, or not positive (s: not in [0, 1)); names the row.
        """
        logs = {}
        for name in self.variables:
            if name not in variables:
                raise UserError(
                    f"law {self.name} needs {', '.join(self.variables)}: {name} is not given "
                    f"(given: {', '.join(variables) or 'nothing'})"
                )
            values = np.asarray(variables[name], dtype=float)
            legal = (values >= 0) & (values < 1) if name == "s" else np.isfinite(values) & (values > 0)
            if not legal.all():
                row = int(np.argmin(legal))
                wanted = "at least 0 and below 1" if name == "s" else "positive"
                where = rows[row] if rows else f"row {row + 1}"
                raise UserError(f"{where}: {name} ({values[row]}) must be {wanted}; leave the row out or correct it")
            if name == "s":
                logs["1-s"] = np.log1p(-values)
            else:
                logs[name] = np.log(values)
        return logs
