"""Arithmetic of the gradient noise scale (McCandlish et al. 2018, arXiv 1812.06162, appendix A.1).

From the squared norms of the same gradient measured with a small and with a big batch follow unbiased estimates of
the true gradient's squared norm and of the noise of one token; their ratio is B_simple, the batch at which noise
and signal are equal. Batch sizes, and so B_simple, are in tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

FEWEST = 3  # estimates below which no interval is given


@dataclass(frozen=True)
class NoiseEstimate:
    """One measurement.

    Attributes:
        g2: estimate of |G|^2, unbiased, so it can come out negative.
        trace: estimate of tr(Sigma), the gradient's covariance for a batch of one token; can come out negative.
        b_simple: trace / g2 in tokens; None unless both are positive.
    """

    g2: float
    trace: float
    b_simple: float | None


@dataclass(frozen=True)
class NoiseAverage:
    """Several measurements as one: numerator and denominator averaged separately, then divided.

    Attributes:
        b_simple: in tokens; None unless both averages are positive.
        low, high: 95 % interval of ``b_simple``; None with fewer than three measurements, or where leaving one out
            makes an average negative, so that the measurements bound nothing.
        n: number of measurements.
    """

    g2: float
    trace: float
    b_simple: float | None
    low: float | None
    high: float | None
    n: int


def _ratio(trace: float, g2: float) -> float | None:
    return trace / g2 if trace > 0 and g2 > 0 else None


def estimate(small_sq: float, big_sq: float, b_small: float, b_big: float) -> NoiseEstimate:
    """Noise from |gradient|^2 at two batch sizes.

    Args:
        small_sq: mean of |G_small|^2 over all the small batches that make up the big one.
        big_sq: |G_big|^2.
        b_small, b_big: tokens in each; ``b_small < b_big``.

    Raises:
        ValueError: the batch sizes are not ``0 < b_small < b_big``.
    """
    if not 0 < b_small < b_big:
        raise ValueError(f"noise scale needs 0 < b_small ({b_small}) < b_big ({b_big})")
    g2 = (b_big * big_sq - b_small * small_sq) / (b_big - b_small)
    trace = (small_sq - big_sq) / (1 / b_small - 1 / b_big)
    return NoiseEstimate(g2, trace, _ratio(trace, g2))


def average(estimates: Sequence[NoiseEstimate]) -> NoiseAverage:
    """Combine measurements of neighbouring steps.

    The mean of the ratios would be biased: it is the ratio of the means that converges. The interval is a
    delete-one jackknife of log B_simple with Student's t, which treats the measurements as independent.

    Raises:
        ValueError: no estimates.
    """
    if not estimates:
        raise ValueError("noise scale: nothing to average")
    n = len(estimates)
    mean_g2 = math.fsum(e.g2 for e in estimates) / n
    mean_trace = math.fsum(e.trace for e in estimates) / n
    value = _ratio(mean_trace, mean_g2)
    low, high = None, None
    if value is not None and n >= FEWEST:
        g2 = np.array([e.g2 for e in estimates])
        trace = np.array([e.trace for e in estimates])
        without_g2, without_trace = (g2.sum() - g2) / (n - 1), (trace.sum() - trace) / (n - 1)
        if (without_g2 > 0).all() and (without_trace > 0).all():
            logs = np.log(without_trace / without_g2)
            error = math.sqrt((n - 1) / n * float(((logs - logs.mean()) ** 2).sum()))
            reach = float(stdtrit(n - 1, 0.975)) * error
            if reach < 30:  # beyond e^30 either way the interval says nothing
                low, high = value * math.exp(-reach), value * math.exp(reach)
    return NoiseAverage(mean_g2, mean_trace, value, low, high, n)
