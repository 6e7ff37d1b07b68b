"""Laws that are sums of products of powers: ``L = sum_j c_j prod_v v^-e``.

Written with the logarithms of the c_j, the logarithm of each term is linear in all coefficients, so log L is a
log-sum-exp of linear functions and its derivative is exact and cheap. Such a law is its list of terms and nothing else.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

import numpy as np
from scipy.optimize import nnls

from .base import Array, Law, Reported, exponent, offset, scale

SMALLEST_SHARE = 1e-3  # of the loss, for a term that linear least squares would leave out of a start


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
            theta[places] = positive_scales(np.einsum("jnp,p->nj", design, theta), loss)
            found.append(np.clip(theta, low, high))
        return np.array(found)


def positive_scales(terms: Array, loss: Array) -> Array:
    """Logarithms [J] of the factors with which terms add up to the loss, by least squares relative to it.

    Args:
        terms: logarithms of the terms without their factors [n, J].
        loss: [n].
    """
    basis = np.exp(terms) / loss[:, None]
    size = basis.mean(axis=0)
    factors = nnls(basis / size, np.ones_like(loss))[0]
    return np.asarray(np.log(np.maximum(factors, SMALLEST_SHARE) / size))


@dataclass(frozen=True)
class Overtraining(SumOfPowers):
    """Chinchilla with equal exponents, in the form that keeps compute and tokens a parameter apart.

    With M = d / n and C = 6 n d, ``C / M = 6 n^2`` and ``C M = 6 d^2``: both terms are powers.
    """

    def logs_of(self, variables: Mapping[str, Array], rows: Sequence[str] | None = None) -> dict[str, Array]:
        logs = super().logs_of(variables, rows)
        return logs | {f"6 {name}^2": np.log(6) + 2 * logs[name] for name in ("n", "d")}


def power(variable: str) -> Law:
    """The power law of one variable."""
    return SumOfPowers(
        "power", "least squares in log space", f"L = a {variable}^-b", (variable,),
        (scale("a", 1e-12), exponent("b", 0.02, 0.1, 0.5, low=-4.0)), "n_active",
        terms={"a": {"b": variable}},
    )  # fmt: skip


CHINCHILLA = SumOfPowers(
    "chinchilla", "Hoffmann et al. 2022, arXiv 2203.15556, eq. 2", "L = E + A / n^alpha + B / d^beta", ("n", "d"),
    (offset("E"), scale("A"), exponent("alpha", 0.05, 0.2, 0.4, 0.6, 1.0),
     scale("B"), exponent("beta", 0.05, 0.2, 0.4, 0.6, 1.0)), "n_active",
    conventions={"n": "all parameters, embeddings included", "d": "tokens seen, each once", "FLOPs": "6 n d"},
    reported=(Reported("MassiveText, fitted by the mean of the Huber terms, which stopped early",
                       {"E": 1.69, "A": 406.4, "alpha": 0.34, "B": 410.7, "beta": 0.28}, "remembered"),),
    terms={"E": {}, "A": {"alpha": "n"}, "B": {"beta": "d"}},
)  # fmt: skip

OVERTRAINING = Overtraining(
    "overtraining", "Gadre et al. 2024, arXiv 2403.08540", "L = E + (a M^eta + b M^-eta) C^-eta, M = d / n, C = 6 n d",
    ("n", "d"), (offset("E"), scale("a"), scale("b"), exponent("eta", 0.05, 0.1, 0.2, 0.3, 0.5)), "n_active",
    conventions={"n": "all parameters, embeddings included", "d": "tokens seen, each once", "FLOPs": "6 n d"},
    terms={"E": {}, "a": {"eta": "6 n^2"}, "b": {"eta": "6 d^2"}},
)  # fmt: skip

GRANULARITY = SumOfPowers(
    "granularity", "Krajewski, Ludziejewski et al. 2024, arXiv 2402.07871",
    "L = c + (g / G^gamma + a) / n^alpha + b / d^beta", ("n", "d", "g"),
    (offset("c"), scale("g"), exponent("gamma", 0.1, 0.3, 0.6, 1.0), scale("a"),
     exponent("alpha", 0.05, 0.1, 0.2, 0.5), scale("b"), exponent("beta", 0.05, 0.1, 0.2, 0.5)), "n_total",
    conventions={"n": "all parameters, embeddings and router left out", "g": "G = 4 x model width / expert width",
                 "e": "64 G experts, each token goes to G of them",
                 "FLOPs": "(72 width^2 + 14 width E G) d blocks: products and router, no attention scores"},
    reported=(Reported("C4, E = 64; c was fixed and G >= 32 left out",
                       {"c": 0.472, "g": 2.1, "gamma": 0.58, "a": 18.1, "alpha": 0.115, "b": 30.8, "beta": 0.147},
                       "read in the paper"),),
    terms={"c": {}, "g": {"gamma": "g", "alpha": "n"}, "a": {"alpha": "n"}, "b": {"beta": "d"}},
)  # fmt: skip

SPARSITY = SumOfPowers(
    "sparsity", "Abnar et al. 2025, arXiv 2501.12370",
    "L = a / n^alpha + b / d^beta + c / (1-s)^lambda + d / ((1-s)^delta n^gamma) + e", ("n", "d", "s"),
    (offset("e"), scale("a"), exponent("alpha", 0.2, 0.4, 0.7), scale("b"), exponent("beta", 0.2, 0.4, 0.7),
     scale("c"), exponent("lambda", -0.5, -0.15, 0.15, low=-3.0, high=3.0), scale("d"),
     exponent("delta", -0.5, 0.15, 0.5, low=-3.0, high=3.0), exponent("gamma", 0.05, 0.15, 0.4)), "n_total",
    conventions={"n": "all parameters", "s": "share of the experts that a token does not go to"},
    reported=(Reported("RedPajama, S <= 0.95",
                       {"e": 0.94, "a": 16612.5, "alpha": 0.5962, "b": 5455.67, "beta": 0.3954, "c": 0.4598,
                        "lambda": -0.1666, "d": 17.26, "delta": 0.1603, "gamma": 0.1595}, "remembered"),),
    terms={"e": {}, "a": {"alpha": "n"}, "b": {"beta": "d"}, "c": {"lambda": "1-s"},
           "d": {"delta": "1-s", "gamma": "n"}},
)  # fmt: skip

DENSE_MOE = SumOfPowers(
    "dense-moe", "Wang et al. 2024, arXiv 2410.05661", "L = A / (n^alpha e^gamma) + B / d^beta + sigma",
    ("n", "d", "e"),
    (offset("sigma"), scale("A"), exponent("alpha", 0.05, 0.2, 0.4, 0.8),
     exponent("gamma", 0.0, 0.05, 0.2, low=-2.0), scale("B"), exponent("beta", 0.05, 0.2, 0.4, 0.8)), "n_active",
    conventions={"e": "routed experts, below 100; 1 for a dense model"},
    terms={"sigma": {}, "A": {"alpha": "n", "gamma": "e"}, "B": {"beta": "d"}},
)  # fmt: skip
