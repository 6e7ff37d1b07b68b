"""IsoFLOP profiles, comparisons and seed noise."""

import csv
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moescale.scaling.cells import budgets_of, finished
from moescale.scaling.fit import fit
from moescale.scaling.isoflop import Profile, best_loss_fits, compare, profiles
from moescale.scaling.points import Point
from moescale.scaling.seeds import seed_noise

PORIAN = Path(__file__).parents[3] / "shared" / "data" / "porian2024_isoflop_points.csv"


def valley(budget: float, best: float, floor: float, sizes: list[float], family: str = "dense") -> list[Point]:
    """Runs on an exact parabola in log N."""
    return [
        Point(run=f"{family} {budget} {n}", family=family, n_total=n, n_active=n, d=budget / (6 * n), c=budget, seed=0,
              loss=floor + 0.05 * math.log(n / best) ** 2)
        for n in sizes
    ]  # fmt: skip


def only(points: list[Point]) -> Profile:
    (profile,) = profiles(points)
    return profile


def test_an_interior_minimum_is_found() -> None:
    profile = only(valley(1e12, 5e4, 3.2, [2e4, 4e4, 8e4, 16e4]))
    assert profile.interior
    assert profile.n_best == pytest.approx(5e4)
    assert profile.loss_best == pytest.approx(3.2)
    assert profile.d_best == pytest.approx(1e12 / (6 * 5e4))
    assert profile.remark == ""


@pytest.mark.parametrize(
    ("sizes", "remark"),
    [
        ([6e4, 8e4, 16e4], "the smallest size is the best"),
        ([1e4, 2e4, 4e4], "the largest size is the best"),
        ([4e4, 8e4], "only 2 sizes"),
        ([4e4], "only 1 size"),
    ],
)
def test_an_edge_is_flagged_and_keeps_the_best_measured_loss(sizes: list[float], remark: str) -> None:
    points = valley(1e12, 5e4, 3.2, sizes)
    profile = only(points)
    assert (profile.interior, profile.remark) == (False, remark)
    assert profile.loss_best == min(p.loss for p in points if p.loss is not None)


def test_seeds_are_averaged_and_the_best_setting_counts() -> None:
    points = valley(1e12, 5e4, 3.2, [2e4, 5e4, 16e4])
    middle = points[1]
    points += [replace(middle, run="seed 1", seed=1, loss=3.3), replace(middle, run="other lr", lr=0.5, loss=3.9)]
    assert only(points).sizes[1].loss == pytest.approx(3.25)
    assert only(points).sizes[1].seeds == 2


def test_budgets_gather_runs_whose_steps_do_not_fit_exactly() -> None:
    points = [Point(run=str(i), c=c) for i, c in enumerate((0.98e11, 1.01e11, 1.02e11, 2.9e11, 3.05e11))]
    assert list(budgets_of(points).values()) == [1e11, 1e11, 1e11, 3e11, 3e11]


def test_unfinished_runs_do_not_count() -> None:
    points = valley(1e12, 5e4, 3.2, [2e4, 4e4, 8e4])
    others = [replace(points[0], run="failed", state="failed"), Point(run="no loss"), replace(points[1], check="lr")]
    assert finished([*points, *others]) == points
    assert profiles([*points, *others]) == profiles(points)


def test_the_multiple_is_what_dense_would_need() -> None:
    budgets = (1e11, 3e11, 1e12, 3e12)
    points = []
    for budget in budgets:
        points += valley(budget, 5e4, 20 * budget**-0.07, [2e4, 5e4, 16e4])
        points += valley(budget, 5e4, 20 * (2.5 * budget) ** -0.07, [2e4, 5e4, 16e4], "moe")
    found = profiles(points)
    assert [p.family for p in found] == ["dense"] * 4 + ["moe"] * 4
    compared = compare(found, best_loss_fits(found), None)
    assert [c.multiple for c in compared] == pytest.approx([2.5] * 4, rel=1e-6)
    assert [c.extrapolated for c in compared] == [False, False, False, True]
    assert all(c.gap.resolved is None and not c.edge and c.gap.value > 0 for c in compared)


def test_two_budgets_make_no_power_law() -> None:
    points = [p for budget in (1e11, 3e11) for family in ("dense", "moe")
              for p in valley(budget, 5e4, 20 * budget**-0.07, [2e4, 5e4, 16e4], family)]  # fmt: skip
    found = profiles(points)
    assert best_loss_fits(found) == {}
    assert all(c.multiple is None for c in compare(found, {}, None))


def test_a_rising_dense_law_gives_no_multiple() -> None:
    c = np.array([1e11, 3e11, 1e12])
    rising = fit("power", {"c": c}, np.array([3.0, 3.1, 3.2]), bootstrap=20)
    found = profiles([p for f in ("dense", "moe") for p in valley(1e12, 5e4, 3.2, [2e4, 5e4, 16e4], f)])
    (comparison,) = compare(found, {"dense": rising}, None)
    assert (comparison.multiple, comparison.low) == (None, None)


def test_the_variance_of_a_minimum_is_that_of_its_mean_of_losses() -> None:
    """Against the scatter of the minimum over drawn seeds, with more seeds at one size."""
    rng = np.random.default_rng(0)
    sizes, seeds = [2e4, 4e4, 8e4, 16e4], [1, 3, 1, 1]
    exact = valley(1e12, 5e4, 3.2, sizes)
    found = []
    for _ in range(400):
        runs = [
            replace(p, run=f"{p.run} {i}", seed=i, loss=(p.loss or 0.0) + 1e-4 * rng.standard_normal())
            for p, count in zip(exact, seeds, strict=True)
            for i in range(count)
        ]
        found.append(only(runs))
    scatter = float(np.var([profile.loss_best for profile in found])) / 1e-8
    assert scatter == pytest.approx(found[0].variance, rel=0.2)
    assert 1 / 3 < found[0].variance < 1


def test_an_exponents_interval_covers_as_often_as_it_says() -> None:
    """Three budgets with seed noise of a known size, measured with four degrees of freedom."""
    rng = np.random.default_rng(1)
    sd, hits = 0.02, 0
    for _ in range(150):
        noise = seed_noise(
            [Point(run=f"s{i}", family="dense", c=3e11, d=1.0, n_active=1.0, seed=i, loss=3 + error)
             for i, error in enumerate(sd * rng.standard_normal(5))]
        )  # fmt: skip
        points = [
            Point(run=str(c), family="dense", c=c, d=1.0, n_active=5e4, loss=20 * c**-0.07 + sd * rng.standard_normal())
            for c in (1e11, 3e11, 1e12)
        ]
        estimate = best_loss_fits(profiles(points), noise)["dense"].coefficients["b"]
        assert estimate.low is not None
        assert estimate.high is not None
        hits += estimate.low <= 0.07 <= estimate.high
    assert 0.9 <= hits / 150 <= 0.995


@pytest.mark.skipif(not PORIAN.exists(), reason="points of Porian et al. 2024: github.com/formll/resolving-scaling-law-discrepancies")  # fmt: skip  # noqa: E501
@pytest.mark.parametrize(
    ("protocol", "exponent"),
    [
        (("base", "long", "kaplan", "kaplan", "train"), 0.835),
        (("base", "long", "kaplan", "standard", "val"), 0.707),
        (("base", "short", "kaplan", "standard", "val"), 0.602),
        (("base", "short", "chinchilla", "standard", "val"), 0.572),
        (("tuned", "short", "const", "standard", "val"), 0.497),
    ],
)
def test_published_runs_give_the_published_exponents(protocol: tuple[str, ...], exponent: float) -> None:
    """Porian et al. 2024, exponent of N_opt over compute on RefinedWeb; they interpolate and weight otherwise."""
    names = ("hparams", "warmup", "decay", "param_count", "val")
    with PORIAN.open() as file:
        rows = [r for r in csv.DictReader(file) if r["dataset"] == "rw" and tuple(r[n] for n in names) == protocol]
    points = [
        Point(run=str(i), family="dense", n_total=float(r["N"]), n_active=float(r["N"]), d=float(r["D"]),
              c=float(r["flops"]), loss=float(r["loss"]), seed=0)
        for i, r in enumerate(rows)
    ]  # fmt: skip
    interior = [p for p in profiles(points) if p.interior]
    assert len(interior) >= 10
    slope = np.polyfit(np.log([p.budget for p in interior]), np.log([p.n_best for p in interior]), 1)[0]
    assert slope == pytest.approx(exponent, abs=0.035)
