"""Laws in which a number saturates: experts beyond E_max add nothing, those below E_s cost as much as they give.

All use the transformation of Clark et al. 2022, ``1/x^ = 1/(x + (1/start - 1/max)^-1) + 1/max``, where x is the number
of experts less one (x^ = start for a dense model) or the share of parameters that a token uses.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

import numpy as np

from .base import Array, Coefficient, Law, Reported, exponent, offset, scale
from .sums import positive_scales

LN10 = float(np.log(10))


def saturated(start: Array, limit: Array, x: Array) -> tuple[Array, Array, Array]:
    """log x^ and its derivatives by log start and log limit, each [S, n].

    Args:
        start, limit: logarithms [S, 1]; start is below limit.
        x: [n], not negative.
    """
    u = 1 / (np.exp(-start) - np.exp(-limit))
    q = x + u
    value = 1 / (1 / q + np.exp(-limit))
    by_start = value * (u / q) ** 2 * np.exp(-start)
    by_limit = value * (1 - (u / q) ** 2) * np.exp(-limit)
    return np.log(value), by_start, by_limit


def saturation(name: str, low: float, high: float, *starts: float) -> Coefficient:
    """Where saturation begins or ends: fitted as its logarithm; those of one law have disjoint bounds."""
    return Coefficient(name, "scale", low, high, starts)


@dataclass(frozen=True)
class SaturatedLogLinear(Law):
    """log L = sum_j theta_j f_j y^p_j: linear but for y, the logarithm of what saturates. Its last two coefficients
    say where saturation begins and ends."""

    @abstractmethod
    def parts(self, logs: Mapping[str, Array]) -> tuple[Array, Array, Array]:
        """f [n, J], p [J] of zeros and ones, and x [n] for `saturated`."""

    def evaluate(self, theta: Array, logs: Mapping[str, Array]) -> tuple[Array, Array]:
        factors, with_y, x = self.parts(logs)
        y, by_start, by_limit = saturated(theta[:, -2:-1], theta[:, -1:], x)
        basis = factors * np.where(with_y, y[..., None], 1.0)  # [S, n, J]
        linear = theta[:, :-2]
        by_y = (linear * with_y) @ factors.T
        derivative = np.concatenate([basis, (by_y * by_start)[..., None], (by_y * by_limit)[..., None]], axis=-1)
        return np.einsum("snj,sj->sn", basis, linear), derivative

    def starts(self, logs: Mapping[str, Array], loss: Array) -> Array:
        """A grid over the saturation, each with the linear coefficients that least squares finds for it."""
        factors, with_y, x = self.parts(logs)
        low, high = self.bounds
        found = []
        for ends in product(*(c.starts for c in self.coefficients[-2:])):
            tail = np.log(ends)
            y = saturated(tail[None, :1], tail[None, 1:], x)[0][0]
            basis = factors * np.where(with_y, y[:, None], 1.0)
            linear = np.linalg.lstsq(basis, np.log(loss), rcond=None)[0]
            found.append(np.clip([*linear, *tail], low, high))
        return np.array(found)


@dataclass(frozen=True)
class Clark(SaturatedLogLinear):
    """Bilinear in log10 n and log10 E^."""

    def parts(self, logs: Mapping[str, Array]) -> tuple[Array, Array, Array]:
        size = logs["n"] / LN10
        factors = np.stack([size * LN10, np.ones_like(size), size, np.full_like(size, LN10)], axis=-1)
        return factors, np.array([0.0, 1.0, 1.0, 0.0]), np.expm1(logs["e"])


@dataclass(frozen=True)
class Leverage(SaturatedLogLinear):
    """A^ to a power that depends on compute and granularity; logarithms of base 10 in the exponent."""

    def parts(self, logs: Mapping[str, Array]) -> tuple[Array, Array, Array]:
        fine, compute = logs["g"] / LN10, logs["c"] / LN10
        factors = np.stack([np.ones_like(fine), compute, fine, fine**2], axis=-1)
        return factors, np.ones(4), np.exp(logs["1-s"])


@dataclass(frozen=True)
class Joint(Law):
    """Chinchilla whose factors and exponents depend on the number of experts."""

    def evaluate(self, theta: Array, logs: Mapping[str, Array]) -> tuple[Array, Array]:
        c, a, alpha, delta, gamma, b, beta, omega, zeta = (theta[:, i, None] for i in range(9))
        y, by_start, by_limit = saturated(theta[:, 9, None], theta[:, 10, None], np.expm1(logs["e"]))
        n, d = np.broadcast_to(logs["n"], y.shape), np.broadcast_to(logs["d"], y.shape)
        by_n = a + delta * y + (alpha + gamma * y) * n
        by_d = b + omega * y + (beta + zeta * y) * d
        terms = np.stack([np.broadcast_to(c, y.shape), by_n, by_d])
        top = terms.max(axis=0)
        shares = np.exp(terms - top)
        total = shares.sum(axis=0)
        of_c, of_n, of_d = shares / total
        by_y = of_n * (delta + gamma * n) + of_d * (omega + zeta * d)
        columns = (
            *(of_c, of_n, of_n * n, of_n * y, of_n * y * n),
            *(of_d, of_d * d, of_d * y, of_d * y * d),
            *(by_y * by_start, by_y * by_limit),
        )
        return top + np.log(total), np.stack(columns, axis=-1)

    def starts(self, logs: Mapping[str, Array], loss: Array) -> Array:
        """A grid over exponents and saturation, each with the scales that linear least squares finds for it."""
        low, high = self.bounds
        scales = [self.names.index(name) for name in ("c", "a", "b")]
        found = []
        for point in product(*(c.starts or (1.0,) for c in self.coefficients)):
            theta = self.to_theta(dict(zip(self.names, point, strict=True)))
            _, _, alpha, delta, gamma, _, beta, omega, zeta, start, limit = theta
            y = saturated(np.array([[start]]), np.array([[limit]]), np.expm1(logs["e"]))[0][0]
            terms = [
                np.zeros_like(y),
                delta * y + (alpha + gamma * y) * logs["n"],
                omega * y + (beta + zeta * y) * logs["d"],
            ]
            theta[scales] = positive_scales(np.stack(terms, axis=-1), loss)
            found.append(np.clip(theta, low, high))
        return np.array(found)


CLARK = Clark(
    "clark", "Clark et al. 2022, arXiv 2202.01169",
    "log10 L = a log10 n + b log10 E^ + c log10 n log10 E^ + d, "
    "1/E^ = 1/(e - 1 + (1/E_s - 1/E_max)^-1) + 1/E_max", ("n", "e"),
    (exponent("a", low=-4.0), exponent("b", low=-4.0), exponent("c", low=-4.0), exponent("d", low=-50.0, high=50.0),
     saturation("E_s", 0.1, 20.0, 1.0, 2.0, 5.0), saturation("E_max", 32.0, 1e8, 64.0, 300.0, 3000.0)), "n_active",
    conventions={"n": "parameters of the dense model that the mixture is made from", "e": "experts, one for a token",
                 "d": "the same for all runs"},
    reported=(Reported("S-Base, 250,000 steps", {"a": -0.082, "b": -0.108, "c": 0.009, "d": 1.104, "E_s": 1.847,
                                                 "E_max": 314.478}, "read in the paper"),),
)  # fmt: skip

LEVERAGE = Leverage(
    "leverage", "Tian et al. 2025, arXiv 2507.17702, eq. 13",
    "EL = A^^(a + d log10 c + beta log10 g + gamma (log10 g)^2), "
    "1/A^ = 1/(A + (1/A_start - 1/A_max)^-1) + 1/A_max, A = 1 - s", ("s", "g", "c"),
    (exponent("a", low=-20.0, high=20.0), exponent("d", low=-4.0), exponent("beta", low=-10.0, high=10.0),
     exponent("gamma", low=-10.0, high=10.0), saturation("A_start", 1e-6, 0.9, 1e-3, 0.01, 0.1),
     saturation("A_max", 1.5, 1e20, 3.0, 1e3, 1e12)),
    quantity="efficiency leverage: FLOPs of a dense model over those of the mixture at equal loss",
    conventions={"s": "1 - A, where A = (K + shared) / (E + shared) counts shared experts",
                 "g": "2 x model width / expert width, half of this project's; only a and beta depend on it",
                 "c": "training FLOPs"},
    reported=(Reported("points of EL < 6; the paper does not say which logarithm it means",
                       {"a": 1.23, "d": -0.0761, "beta": -0.117, "gamma": 0.0167, "A_start": 0.0163, "A_max": 5.28e16},
                       "read in the paper"),),
)  # fmt: skip

JOINT = Joint(
    "joint", "Ludziejewski et al. 2025, arXiv 2502.05172, eq. 6",
    "L = a E^^delta n^(alpha + gamma ln E^) + b E^^omega d^(beta + zeta ln E^) + c, E^ as in clark", ("n", "d", "e"),
    (offset("c"), scale("a"), exponent("alpha", -0.1, -0.3, low=-4.0), exponent("delta", -0.3, 0.0, low=-4.0),
     exponent("gamma", 0.0, low=-1.0, high=1.0), scale("b"), exponent("beta", -0.1, -0.3, low=-4.0),
     exponent("omega", 0.0, 0.5, low=-4.0), exponent("zeta", 0.0, low=-1.0, high=1.0),
     saturation("E_s", 0.1, 20.0, 1.0, 2.0), saturation("E_max", 32.0, 1e8, 300.0)), "n_active",
    conventions={"n": "active parameters, embeddings included", "e": "experts, one for a token; G = 1",
                 "FLOPs": "6 n d"},
    reported=(Reported("FineWeb-Edu, E <= 32", {"c": 1.3637, "a": 35.91, "alpha": -0.1889, "delta": -0.2285,
                                                "gamma": 0.0098, "b": 35.98, "beta": -0.1775, "omega": 0.5529,
                                                "zeta": -0.0259, "E_s": 2.0732, "E_max": 290.4521},
                       "read in the paper"),),
)  # fmt: skip
