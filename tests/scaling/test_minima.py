"""Minima along one axis, and power laws through them."""

import math

import numpy as np
import pytest

from moescale.scaling.exponents import growths
from moescale.scaling.isoflop import profiles
from moescale.scaling.lines import power_line
from moescale.scaling.minima import minimum
from moescale.scaling.points import Point
from moescale.scaling.seeds import SeedNoise, Spread

X = [1e4, 2e4, 4e4, 8e4, 16e4]


def noise_of(sd: float, freedom: int) -> SeedNoise:
    spread = Spread(sd, freedom)
    return SeedNoise(spread, {"dense": spread}, (), None)


def losses(best: float, curvature: float = 0.05) -> list[float]:
    return [3 + curvature * math.log(x / best) ** 2 for x in X]


def test_parabola_and_interpolation_find_the_same_valley() -> None:
    found = minimum(X, losses(5e4), [1] * 5, Spread(1e-4, 10))
    assert found.interior
    assert found.at == pytest.approx(5e4)
    assert found.akima == pytest.approx(5e4, rel=0.03)
    assert found.low is not None
    assert found.high is not None
    assert found.low < 5e4 < found.high


def test_the_interpolation_follows_a_lopsided_valley_that_the_parabola_does_not() -> None:
    lopsided = [3 + (0.02 if x < 4.5e4 else 0.5) * math.log(x / 4.5e4) ** 2 for x in X]
    found = minimum(X, lopsided, [1] * 5, None)
    assert found.akima == pytest.approx(4.0e4, rel=0.15)
    assert found.at < 0.75 * found.akima
    assert not len(found.draws)


def test_an_interval_that_goes_beyond_what_was_measured_is_open() -> None:
    found = minimum(X, losses(5e4, 0.002), [1] * 5, Spread(0.02, 4))
    assert found.open_low
    assert found.open_high
    assert (found.low, found.high) == (None, None)


@pytest.mark.parametrize("best", [5e3, 4e5])
def test_an_edge_has_no_interval(best: float) -> None:
    found = minimum(X, losses(best), [1] * 5, Spread(0.01, 4))
    assert (found.interior, found.low, found.high, found.akima) == (False, None, None, None)


def test_the_interval_of_a_minimum_covers_at_its_rate() -> None:
    """Seed noise known from six degrees of freedom, over 200 sets of losses."""
    rng = np.random.default_rng(0)
    sd, inside = 0.004, 0
    for _ in range(200):
        measured = np.array(losses(4.5e4)) + sd * rng.standard_normal(5)
        spread = Spread(sd * math.sqrt(rng.chisquare(6) / 6), 6)
        found = minimum(X, list(measured), [1] * 5, spread)
        inside += (found.low or 0) <= 4.5e4 <= (found.high or math.inf)
    assert 0.90 <= inside / 200 <= 0.99


def test_a_power_line_covers_and_widens_away_from_its_values() -> None:
    rng = np.random.default_rng(1)
    x, inside = [1e11, 3e11, 1e12, 3e12], 0
    for _ in range(200):
        y = [5 * v**0.4 * math.exp(0.1 * rng.standard_normal()) for v in x]
        line = power_line(x, y, [0.1] * 4, 6)
        assert line is not None
        inside += (line.power.low or 0) <= 0.4 <= (line.power.high or 0)
    assert 0.90 <= inside / 200 <= 0.99
    near, far = line.at(5e11), line.at(1e15)
    assert (far.high or 0) / (far.low or 1) > (near.high or 0) / (near.low or 1)
    assert line.beyond(3e13) == pytest.approx(10)
    assert line.beyond(5e11) == 1


def test_two_values_make_no_power_line() -> None:
    assert power_line([1.0, 1.0, 2.0], [1.0, 2.0, 3.0]) is None


def test_exponents_of_optima_are_recovered() -> None:
    """n_opt grows as C^.45, with C = 6 n d exactly."""
    points = [
        Point(f"{c:g} {f}", "dense", n_total=n, n_active=n, d=c / (6 * n), c=c, seed=0,
              loss=20 * c**-0.07 + 0.05 * math.log(f) ** 2)
        for c in (1e11, 3e11, 1e12, 3e12)
        for f in (0.25, 0.5, 1.0, 2.0, 4.0)
        for n in [f * 0.1 * c**0.45]
    ]  # fmt: skip
    by_n, by_d = growths(profiles(points, noise_of(1e-4, 8)), {}, noise_of(1e-4, 8))
    assert by_n.line is not None
    assert by_d.line is not None
    assert by_n.line.power.value == pytest.approx(0.45, abs=0.003)
    assert by_d.line.power.value == pytest.approx(0.55, abs=0.003)
    assert (by_n.optima, by_n.budgets, by_n.open) == (4, 4, False)
