"""Information criteria against closed forms, and what a comparison of laws says."""

import numpy as np
import pytest

from moescale.scaling.criteria import compare, criteria
from moescale.scaling.fit import Fit, fit
from moescale.scaling.laws import LAWS

TRUE = {"E": 1.5, "A": 40, "alpha": 0.35, "B": 120, "beta": 0.3}


def points(count: int, noise: float) -> tuple[dict[str, np.ndarray], np.ndarray]:
    rng = np.random.default_rng(1)
    variables = {"n": np.exp(rng.uniform(10.3, 14.9, count)), "d": np.exp(rng.uniform(11.5, 18.4, count))}
    return variables, LAWS["chinchilla"].predict(TRUE, variables) * np.exp(noise * rng.standard_normal(count))


def fits(names: list[str], count: int, noise: float, held: int) -> list[Fit]:
    variables, loss = points(count, noise)
    hold_out = np.argsort(np.argsort(-variables["n"])) < held
    return [fit(name, variables, loss, hold_out=hold_out if held else None) for name in names]


def test_a_large_delta_gives_the_criteria_of_least_squares() -> None:
    residual = np.random.default_rng(0).standard_normal(30) * 0.01
    found = criteria(residual, 1e3, np.ones(30), 2)
    twice_negative = 30 * (np.log(2 * np.pi * np.mean(residual**2)) + 1)
    assert found.bic == pytest.approx(3 * np.log(30) + twice_negative, rel=1e-9)
    assert found.aicc == pytest.approx(6 + twice_negative + 24 / 26, rel=1e-9)


def test_a_small_delta_gives_those_of_least_absolute_deviations() -> None:
    residual = np.random.default_rng(0).standard_normal(30) * 0.01
    found = criteria(residual, 1e-7, np.ones(30), 2)
    twice_negative = 60 * (np.log(2 * np.mean(np.abs(residual))) + 1)
    assert found.bic == pytest.approx(3 * np.log(30) + twice_negative, rel=1e-4)


def test_too_few_points_for_the_correction() -> None:
    assert criteria(np.full(4, 0.01), 1e-3, np.ones(4), 2).aicc is None


def test_the_law_that_made_the_data_wins_and_says_so() -> None:
    contest = compare(fits(["kaplan", "chinchilla"], 60, 0.002, 12))
    assert [one.law for one in contest.fits] == ["chinchilla", "kaplan"]
    assert contest.ahead[0] == 0
    assert contest.sentences[0].startswith("held out: chinchilla predicts best")
    assert "; resolved at 95 %" in contest.sentences[0]
    assert "chinchilla is ahead of kaplan" in contest.sentences[1]
    assert "not resolved" not in contest.sentences[1]


def test_laws_that_cannot_be_told_apart_are_called_so() -> None:
    contest = compare(fits(["overtraining", "chinchilla"], 20, 0.3, 4))
    assert "not resolved" in contest.sentences[0]
    assert "not resolved, since" in contest.sentences[1]


def test_without_held_out_points_nothing_is_said_of_prediction() -> None:
    contest = compare(fits(["kaplan", "chinchilla"], 30, 0.002, 0))
    assert contest.sentences[0] == "no point was held out: nothing is predicted here"
    assert contest.fits[0].law == "chinchilla"
    assert "2 held-out points are too few" in compare(fits(["kaplan", "chinchilla"], 30, 0.002, 2)).sentences[0]
