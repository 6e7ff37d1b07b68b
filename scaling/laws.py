"""Scaling laws: what each one says, in a form that one fitter can fit.

Most published laws are sums of products of powers, ``L = sum_j c_j prod_v v^-e``. Written with the logarithms of
the c_j, the logarithm of each term is linear in all coefficients, so log L is a log-sum-exp of linear functions and
its derivative is exact and cheap. Such a law is its list of terms and nothing else (`SumOfPowers`). A law of another
form gives `evaluate` and `starts` itself.

Coefficients have the names used in docs/laws.md. A "scale" is positive and fitted as its logarithm; an "exponent" is
fitted as it is. ``theta`` is the vector of fitted values, ``[..., P]``.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from ..base.errors import UserError

Array = NDArray[np.float64]
SMALLEST_SHARE = 1e-3  # of the loss, for a term that linear least squares would leave out of a start


@dataclass(frozen=True)
class Coefficient:
    """A coefficient's name, kind, bounds and the values from which fits start.

    Attributes:
        starts: empty for a scale that enters linearly: linear least squares then finds its start.
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
class Law(ABC):
    """A law.

    Attributes:
        name: as in ``moescale fit --law``.
        paper: where it comes from.
        equation: for people.
        variables: names of what it is a function of, as in points tables.
        coefficients: in the order of ``theta``.
        n_counts: the column of a points table that the law's n means, if it has an n.
    """

    name: str
    paper: str
    equation: str
    variables: tuple[str, ...]
    coefficients: tuple[Coefficient, ...]
    n_counts: Literal["n_total", "n_active"] | None = None

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
        """Loss [n], in nats a token, from coefficients by name and variables [n]."""
        return np.exp(self.evaluate(self.to_theta(values)[None], self.logs_of(variables))[0][0])

    def logs_of(self, variables: Mapping[str, Array]) -> dict[str, Array]:
        """Logarithms of the law's variables; sparsity s enters as log(1 - s) under the name ``1-s``.

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
                raise UserError(f"row {row + 1}: {name} ({values[row]}) must be {wanted}")
            if name == "s":
                logs["1-s"] = np.log1p(-values)
            else:
                logs[name] = np.log(values)
        return logs


@dataclass(frozen=True)
class SumOfPowers(Law):
    """A sum of terms, each a scale times powers of variables.

    Attributes:
        terms: for each scale, the exponents that lower its term and the variable each is the (negative) power of.
    """

    terms: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def _design(self, logs: Mapping[str, Array]) -> Array:
        """Derivatives of the logarithms of the terms by theta [terms, n, P]; constants, since they are linear."""
        points = len(next(iter(logs.values())))
        design = np.zeros((len(self.terms), points, len(self.coefficients)))
        for j, (factor, powers) in enumerate(self.terms.items()):
            design[j, :, self.names.index(factor)] = 1.0
            for name, variable in powers.items():
                design[j, :, self.names.index(name)] -= logs[variable]
        return design

    def evaluate(self, theta: Array, logs: Mapping[str, Array]) -> tuple[Array, Array]:
        design = self._design(logs)
        terms = np.einsum("jnp,sp->jsn", design, theta)
        top = terms.max(axis=0)
        shares = np.exp(terms - top)
        total = shares.sum(axis=0)
        return top + np.log(total), np.einsum("jsn,jnp->snp", shares / total, design)

    def starts(self, logs: Mapping[str, Array], loss: Array) -> Array:
        """A grid over the exponents, each with the scales that linear least squares finds for it."""
        design = self._design(logs)
        places = [self.names.index(factor) for factor in self.terms]
        low, high = self.bounds
        found = []
        for point in product(*(c.starts if c.kind == "exponent" else (0.0,) for c in self.coefficients)):
            theta = np.array(point)
            basis = np.exp(np.einsum("jnp,p->nj", design, theta)) / loss[:, None]  # relative to the loss
            size = basis.mean(axis=0)
            factors = nnls(basis / size, np.ones_like(loss))[0]
            theta[places] = np.log(np.maximum(factors, SMALLEST_SHARE) / size)
            found.append(np.clip(theta, low, high))
        return np.array(found)


@dataclass(frozen=True)
class Kaplan(Law):
    """``L = [(N_c/n)^(a_N/a_D) + D_c/d]^a_D``: one exponent sits outside the sum."""

    def evaluate(self, theta: Array, logs: Mapping[str, Array]) -> tuple[Array, Array]:
        log_n, a_n, log_d, a_d = (theta[:, i, None] for i in range(4))
        by_n, by_d = log_n - logs["n"], log_d - logs["d"]
        inner = np.logaddexp(a_n / a_d * by_n, by_d)  # log of the bracket
        share = np.exp(a_n / a_d * by_n - inner)  # of the first term in the sum
        derivative = np.stack([share * a_n, share * by_n, a_d * (1 - share), inner - share * a_n / a_d * by_n], axis=-1)
        return a_d * inner, derivative

    def starts(self, logs: Mapping[str, Array], loss: Array) -> Array:
        """A grid over the exponents; each term alone explains part of the mean loss."""
        found = []
        exponents = (c.starts for c in self.coefficients if c.kind == "exponent")
        for (a_n, a_d), part in product(product(*exponents), (0.25, 0.5, 0.75)):
            inner = np.mean(np.log(loss)) / a_d
            log_n = logs["n"].mean() + (inner + np.log(part)) * a_d / a_n
            found.append([log_n, a_n, logs["d"].mean() + inner + np.log1p(-part), a_d])
        low, high = self.bounds
        return np.clip(np.array(found), low, high)


def power(variable: str) -> Law:
    """The power law of one variable."""
    return SumOfPowers(
        "power", "least squares in log space", f"L = a {variable}^-b", (variable,),
        (scale("a", 1e-12), exponent("b", 0.02, 0.1, 0.5, low=-4.0)), "n_active",
        terms={"a": {"b": variable}},
    )  # fmt: skip


CHINCHILLA = SumOfPowers(
    "chinchilla", "Hoffmann et al. 2022, arXiv 2203.15556", "L = E + A / n^alpha + B / d^beta", ("n", "d"),
    (offset("E"), scale("A"), exponent("alpha", 0.05, 0.2, 0.4, 0.6, 1.0),
     scale("B"), exponent("beta", 0.05, 0.2, 0.4, 0.6, 1.0)), "n_active",
    terms={"E": {}, "A": {"alpha": "n"}, "B": {"beta": "d"}},
)  # fmt: skip

KAPLAN = Kaplan(
    "kaplan", "Kaplan et al. 2020, arXiv 2001.08361", "L = [(N_c / n)^(a_N / a_D) + D_c / d]^a_D", ("n", "d"),
    (scale("N_c", 1e-3), exponent("a_N", 0.05, 0.1, 0.2, 0.4, low=1e-3),
     scale("D_c", 1e-3), exponent("a_D", 0.05, 0.1, 0.2, 0.4, low=1e-3)), "n_active",
)  # fmt: skip

GRANULARITY = SumOfPowers(
    "granularity", "Krajewski, Ludziejewski et al. 2024, arXiv 2402.07871",
    "L = c + (g / G^gamma + a) / n^alpha + b / d^beta", ("n", "d", "g"),
    (offset("c"), scale("g"), exponent("gamma", 0.1, 0.3, 0.6, 1.0), scale("a"),
     exponent("alpha", 0.05, 0.1, 0.2, 0.5), scale("b"), exponent("beta", 0.05, 0.1, 0.2, 0.5)), "n_total",
    terms={"c": {}, "g": {"gamma": "g", "alpha": "n"}, "a": {"alpha": "n"}, "b": {"beta": "d"}},
)  # fmt: skip

SPARSITY = SumOfPowers(
    "sparsity", "Abnar et al. 2025, arXiv 2501.12370",
    "L = a / n^alpha + b / d^beta + c / (1-s)^lambda + d / ((1-s)^delta n^gamma) + e", ("n", "d", "s"),
    (offset("e"), scale("a"), exponent("alpha", 0.2, 0.4, 0.7), scale("b"), exponent("beta", 0.2, 0.4, 0.7),
     scale("c"), exponent("lambda", -0.5, -0.15, 0.15, low=-3.0, high=3.0), scale("d"),
     exponent("delta", -0.5, 0.15, 0.5, low=-3.0, high=3.0), exponent("gamma", 0.05, 0.15, 0.4)), "n_total",
    terms={"e": {}, "a": {"alpha": "n"}, "b": {"beta": "d"}, "c": {"lambda": "1-s"},
           "d": {"delta": "1-s", "gamma": "n"}},
)  # fmt: skip

DENSE_MOE = SumOfPowers(
    "dense-moe", "Wang et al. 2024, arXiv 2410.05661", "L = A / (n^alpha e^gamma) + B / d^beta + sigma",
    ("n", "d", "e"),
    (offset("sigma"), scale("A"), exponent("alpha", 0.05, 0.2, 0.4, 0.8),
     exponent("gamma", 0.0, 0.05, 0.2, low=-2.0), scale("B"), exponent("beta", 0.05, 0.2, 0.4, 0.8)), "n_active",
    terms={"sigma": {}, "A": {"alpha": "n", "gamma": "e"}, "B": {"beta": "d"}},
)  # fmt: skip

LAWS: dict[str, Law] = {law.name: law for law in (CHINCHILLA, KAPLAN, GRANULARITY, SPARSITY, DENSE_MOE, power("c"))}


def law_named(name: str, variables: Mapping[str, object] | None = None) -> Law:
    """The law of that name.

    ``power`` is a law of compute, unless ``variables`` holds no ``c`` and exactly one other variable.

    Raises:
        UserError: no such law; lists those there are.
    """
    if name not in LAWS:
        raise UserError(f"law {name!r}: unknown; the laws are {', '.join(LAWS)}")
    if name == "power" and variables is not None and "c" not in variables and len(variables) == 1:
        return power(next(iter(variables)))
    return LAWS[name]


def chinchilla_optimum(values: Mapping[str, float], compute: float) -> dict[str, float]:
    """n, d and loss of the best model for ``compute`` FLOPs, in closed form (Hoffmann et al. 2022, eq. 4).

    Rests on the law's own convention compute = 6 n d, which leaves attention, router and head out.
    """
    e, a, alpha, b, beta = (values[name] for name in CHINCHILLA.names)
    ratio = (alpha * a / (beta * b)) ** (1 / (alpha + beta))
    n = ratio * (compute / 6) ** (beta / (alpha + beta))
    d = (compute / 6) ** (alpha / (alpha + beta)) / ratio
    return {"n": n, "d": d, "loss": e + a / n**alpha + b / d**beta}
