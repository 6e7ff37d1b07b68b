"""The law of Kaplan et al. 2020, whose outer exponent makes it no sum of powers."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

import numpy as np

from .base import Array, Law, Reported, exponent, scale


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


KAPLAN = Kaplan(
    "kaplan", "Kaplan et al. 2020, arXiv 2001.08361, eq. 1.5", "L = [(N_c / n)^(a_N / a_D) + D_c / d]^a_D", ("n", "d"),
    (scale("N_c", 1e-3), exponent("a_N", 0.05, 0.1, 0.2, 0.4, low=1e-3),
     scale("D_c", 1e-3), exponent("a_D", 0.05, 0.1, 0.2, 0.4, low=1e-3)), "n_active",
    conventions={"n": "parameters without embeddings", "d": "unique tokens; training stops early"},
    reported=(Reported("WebText2", {"N_c": 6.4e13, "a_N": 0.076, "D_c": 1.8e13, "a_D": 0.103}, "remembered"),),
)  # fmt: skip
