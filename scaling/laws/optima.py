"""The best model for a budget of compute, for laws whose papers say what compute costs."""

from collections.abc import Mapping

import numpy as np
from scipy.optimize import minimize_scalar

from .sums import CHINCHILLA, GRANULARITY

FINEST = 1024  # granularity
PRODUCTS, ROUTING = 6, 14  # FLOPs for each parameter and token, of the products and of the router
WIDTH_OF_BLOCKS = 64  # width / blocks of the models that the granularity law was fitted to
WIDTHS = (16.0, 1e6)


def chinchilla_optimum(values: Mapping[str, float], compute: float) -> dict[str, float]:
    """n, d and loss of the best model for ``compute`` FLOPs, in closed form (Hoffmann et al. 2022, eq. 4).

    Rests on the law's own convention compute = 6 n d, which leaves attention, router and head out.
    """
    e, a, alpha, b, beta = (values[name] for name in CHINCHILLA.names)
    ratio = (alpha * a / (beta * b)) ** (1 / (alpha + beta))
    n = ratio * (compute / 6) ** (beta / (alpha + beta))
    d = (compute / 6) ** (alpha / (alpha + beta)) / ratio
    return {"n": n, "d": d, "loss": e + a / n**alpha + b / d**beta}


def granularity_flops_per_token(width: float, granularity: float, experts: int) -> float:
    """Training FLOPs of a token by the count of Krajewski, Ludziejewski et al. 2024.

    ``(12 width^2 c_f + width E G c_r) blocks`` with c_f = 6 and c_r = 14: products and router, no attention scores.

    Args:
        width: of the model, in blocks of a 64th as many.
        experts: E, how many times the parameters of a dense layer the experts hold; their number is E G.
    """
    return (12 * width**2 * PRODUCTS + width * experts * granularity * ROUTING) * width / WIDTH_OF_BLOCKS


def granularity_optimum(values: Mapping[str, float], compute: float, experts: int = 64) -> dict[str, float]:
    """The best mixture for ``compute`` FLOPs by the granularity law and its paper's count of FLOPs.

    Granularity is a power of two, size and tokens are continuous.

    Returns:
        n (all parameters but embeddings and router, as the law counts), n_active, d, g and loss.
    """

    def model(log_width: float, g: int) -> dict[str, float]:
        width = float(np.exp(log_width))
        block = width**2 * width / WIDTH_OF_BLOCKS  # width^2 x blocks
        n, d = 4 * (2 * experts + 1) * block, compute / granularity_flops_per_token(width, g, experts)
        point = {"n": np.array([n]), "d": np.array([d]), "g": np.array([float(g)])}
        return {"n": n, "n_active": 12 * block, "d": d, "g": g, "loss": float(GRANULARITY.predict(values, point)[0])}

    best = []
    for g in (2**power for power in range(int(np.log2(FINEST)) + 1)):
        found = minimize_scalar(
            lambda log_width, g=g: model(log_width, g)["loss"],
            bounds=np.log(WIDTHS),
            method="bounded",
            options={"xatol": 1e-9},
        )
        best.append(model(float(found.x), g))
    return min(best, key=lambda one: one["loss"])
