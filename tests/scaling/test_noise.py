"""Noise-scale arithmetic on gradients whose mean and covariance are known."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moescale.scaling.noise import NoiseEstimate, average, estimate

DIMENSION, SMALL, BIG = 40, 64, 512
MEAN = np.linspace(0.1, 0.5, DIMENSION)
SPREAD = np.linspace(1.0, 3.0, DIMENSION)  # standard deviation of one token's gradient
G2, TRACE = float((MEAN**2).sum()), float((SPREAD**2).sum())


def measure(rng: np.random.Generator) -> NoiseEstimate:
    """A big batch made of small ones, as the training loop measures it."""
    small = MEAN + SPREAD / np.sqrt(SMALL) * rng.standard_normal((BIG // SMALL, DIMENSION))
    return estimate(float((small**2).sum(axis=1).mean()), float((small.mean(axis=0) ** 2).sum()), SMALL, BIG)


def test_numerator_and_denominator_are_unbiased() -> None:
    rng = np.random.default_rng(0)
    found = [measure(rng) for _ in range(4000)]
    for values, truth in (([e.g2 for e in found], G2), ([e.trace for e in found], TRACE)):
        error = np.std(values) / np.sqrt(len(values))
        assert abs(np.mean(values) - truth) < 4 * error
        assert error < 0.01 * truth


def test_the_average_beats_the_mean_of_ratios() -> None:
    rng = np.random.default_rng(1)
    found = [measure(rng) for _ in range(4000)]
    ratio = average(found).b_simple
    assert ratio is not None
    assert ratio == pytest.approx(TRACE / G2, rel=0.01)
    biased = np.mean([e.b_simple for e in found if e.b_simple is not None])
    assert abs(biased - TRACE / G2) > abs(ratio - TRACE / G2)


def test_the_interval_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    hits = 0
    for _ in range(400):
        found = average([measure(rng) for _ in range(12)])
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= TRACE / G2 <= found.high
    assert 0.91 <= hits / 400 <= 0.98


@given(g2=st.floats(1e-6, 1e6), trace=st.floats(1e-6, 1e6), small=st.integers(1, 1000), times=st.integers(2, 100))
def test_exact_expectations_give_the_truth_back(g2: float, trace: float, small: int, times: int) -> None:
    found = estimate(g2 + trace / small, g2 + trace / (small * times), small, small * times)
    scale = g2 + trace / small
    assert found.g2 == pytest.approx(g2, abs=1e-12 * scale * times, rel=1e-9)
    assert found.trace == pytest.approx(trace, abs=1e-11 * scale * small * times)


def test_without_signal_there_is_no_ratio() -> None:
    found = estimate(1.0, 0.05, 64, 512)
    assert found.g2 < 0
    assert found.b_simple is None
    assert average([found, found, found]).b_simple is None
    assert average([estimate(1.0, 0.5, 64, 512)]).low is None
    with pytest.raises(ValueError, match="b_small"):
        estimate(1.0, 0.5, 64, 64)
    with pytest.raises(ValueError, match="nothing"):
        average([])
