"""Data saved: recovered from laws that are known."""

import math

import numpy as np
import pytest

from moescale.scaling.fit import fit
from moescale.scaling.fitted import Fit
from moescale.scaling.laws import LAWS
from moescale.scaling.points import Point, variables_of
from moescale.scaling.saving import Saving, savings, tokens_needed
from moescale.scaling.seeds import seed_noise

SIZES, TOKENS = (3e4, 6e4, 12e4, 24e4), (1e5, 2e5, 4e5, 8e5, 16e5)
SD = 0.004


def dense_loss(n: float, d: float) -> float:
    return 1.7 + 15 / n**0.3 + 70 / d**0.35


def run(family: str, n: float, d: float, loss: float, seed: int = 0) -> Point:
    return Point(run=f"{family} {n} {d} {seed}", family=family, seed=seed, n_total=n, n_active=n, n_router=0,
                 n_embedding=n / 2, d=d, c=6 * n * d, b=512, lr=0.01, loss=loss)  # fmt: skip


def study(factor: float, sd: float = SD, rng: np.random.Generator | None = None) -> list[Point]:
    """A mixture that reaches in D tokens what dense needs ``factor`` D for, with three seeds in one cell of each."""
    rng = rng or np.random.default_rng(0)
    points = []
    for family, times in (("dense", 1.0), ("moe", factor)):
        for n in SIZES:
            for d in TOKENS:
                for seed in range(4 if (n, d) == (SIZES[1], TOKENS[2]) else 1):
                    loss = dense_loss(n, times * d) + sd * float(rng.standard_normal())
                    points.append(run(family, n, d, loss, seed))
    return points


def law_of(points: list[Point]) -> Fit:
    variables, loss, used = variables_of([p for p in points if p.family == "dense"], LAWS["chinchilla"])
    return fit("chinchilla", variables, loss, bootstrap=100, names=[p.run for p in used])


def middle(found: list[Saving]) -> Saving:
    return next(s for s in found if s.active == SIZES[2] and s.tokens == TOKENS[2])


def test_the_law_recovers_what_was_put_in_within_its_interval() -> None:
    points = study(1.5)
    found = savings(points, {"dense": law_of(points)}, seed_noise(points))
    assert len(found) == len(SIZES) * len(TOKENS)
    saving = middle(found)
    assert saving.by_law
    assert saving.low is not None
    assert saving.high is not None
    assert saving.low <= 1 - 1 / 1.5 <= saving.high
    assert saving.high - saving.low < 0.25
    assert saving.resolved
    covered = [s.low <= 1 - 1 / 1.5 <= s.high for s in found if s.low is not None and s.high is not None]
    assert np.mean(covered) > 0.8


def test_without_a_law_runs_of_the_same_shape_are_interpolated() -> None:
    points = study(1.5)
    saving = middle(savings(points, {}, seed_noise(points)))
    assert not saving.by_law
    assert saving.share == pytest.approx(1 - 1 / 1.5, abs=0.06)
    assert saving.low is not None
    assert saving.high is not None
    assert saving.low <= 1 - 1 / 1.5 <= saving.high


def test_a_law_of_other_runs_is_not_used() -> None:
    points = study(1.5)
    variables, loss, used = variables_of(points, LAWS["chinchilla"])
    both = fit("chinchilla", variables, loss, bootstrap=5, names=[p.run for p in used])
    assert not middle(savings(points, {"all": both}, None)).by_law


@pytest.mark.parametrize("by_law", [True, False])
def test_no_value_further_than_twice_the_measured_tokens(by_law: bool) -> None:
    points = study(3.0, sd=0.0)
    found = savings(points, {"dense": law_of(points)} if by_law else {}, None)
    for saving in found:
        needed = 3 * saving.tokens
        if needed > 2.1 * TOKENS[-1]:
            assert saving.share is None
            assert "more than twice the most tokens measured" in saving.why
        elif needed <= TOKENS[-1]:
            assert saving.share == pytest.approx(2 / 3, abs=0.02)
            assert not saving.extrapolated
    assert any(s.extrapolated for s in found) == any(TOKENS[-1] < 3 * s.tokens <= 2 * TOKENS[-1] for s in found)


def test_a_worse_mixture_saves_less_than_nothing() -> None:
    points = study(0.7, sd=0.0)
    assert middle(savings(points, {}, None)).share == pytest.approx(1 - 1 / 0.7, abs=0.04)


def test_without_dense_runs_or_a_dense_run_of_the_size_there_is_none() -> None:
    points = study(1.5)
    assert savings([p for p in points if p.family == "moe"], {}, None) == []
    small = [p for p in points if p.family == "moe" or p.n_active == SIZES[0]]
    assert {s.why for s in savings(small, {}, None) if s.active > 1.25 * SIZES[0]} == {"no dense run of this size"}
    one = [p for p in points if p.family == "moe" or (p.d == TOKENS[0] and p.seed == 0)]
    assert all("fewer than two dense runs of this shape" in s.why for s in savings(one, {}, None))


def test_a_loss_below_the_offset_needs_infinite_tokens() -> None:
    values = {"E": 1.7, "A": 15.0, "alpha": 0.3, "B": 70.0, "beta": 0.35}
    assert tokens_needed(values, 1e5, dense_loss(1e5, 3e5)) == pytest.approx(3e5)
    assert tokens_needed(values, 1e5, 1.7) == math.inf
