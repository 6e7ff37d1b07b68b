"""Seed noise by family, and which differences exceed it."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from moescale.scaling.cells import Cell, cells_of
from moescale.scaling.isoflop import compare, profiles
from moescale.scaling.points import Point
from moescale.scaling.seeds import SeedNoise, Spread, difference, pairings, reach, seed_noise, t_factor


def runs(family: str, losses: dict[int, float], n: float = 5e4) -> list[Point]:
    return [
        Point(run=f"{family} {n} {seed}", family=family, seed=seed, n_total=n, n_active=n, n_router=0, d=1e6, c=1e12,
              loss=loss)
        for seed, loss in losses.items()
    ]  # fmt: skip


def cell(family: str, losses: dict[int, float]) -> Cell:
    (found,) = cells_of(runs(family, losses))
    return found


def known(**spreads: Spread) -> SeedNoise:
    return SeedNoise(Spread(0.05, 20), spreads, (), 0.5)


def test_each_family_has_the_deviation_of_its_own_cells(study: SimpleNamespace) -> None:
    noise = seed_noise(study.points)
    assert noise is not None
    assert [(c.family, len(c.losses)) for c in noise.cells] == [("dense", 3), ("E8G2", 3), ("E8G4", 3)]
    for c in noise.cells:
        assert noise.families[c.family].sd == pytest.approx(np.std(c.losses, ddof=1))
        assert noise.families[c.family].freedom == 2
    pooled = math.sqrt(sum(float(np.var(c.losses, ddof=1)) * 2 for c in noise.cells) / 6)
    assert noise.pooled.sd == pytest.approx(pooled)
    assert noise.pooled.freedom == 6
    assert seed_noise([p for p in study.points if p.seed == 0]) is None


def test_runs_that_differ_in_more_than_the_seed_are_no_seeds() -> None:
    points = runs("dense", {0: 3.0, 1: 3.1})
    assert seed_noise(points) is not None
    assert seed_noise([points[0], replace(points[1], check="lr")]) is None
    assert seed_noise([*points, replace(points[0], run="something else", loss=3.5)]) is None


def test_families_that_differ_are_not_pooled() -> None:
    quiet, loud = {0: 3.00, 1: 3.01, 2: 2.99, 3: 3.0}, {0: 3.0, 1: 3.4, 2: 2.6, 3: 3.1}
    noise = seed_noise(runs("dense", quiet) + runs("moe", loud))
    assert noise is not None
    assert not noise.alike
    assert noise.p_alike is not None
    assert noise.p_alike < 0.05
    assert noise.of("dense")[1] == noise.families["dense"]
    assert noise.of("unmeasured") == ("moe", noise.families["moe"])
    similar = seed_noise(runs("dense", quiet) + runs("moe", {s: x + 0.002 * s for s, x in quiet.items()}))
    assert similar is not None
    assert similar.alike
    assert similar.of("unmeasured") == ("all families", similar.pooled)


def test_a_test_of_equal_variances_is_wrong_as_often_as_it_says() -> None:
    rng = np.random.default_rng(3)
    found = []
    for _ in range(300):
        noise = seed_noise(
            [p for f in ("dense", "moe") for p in runs(f, dict(enumerate(3 + 0.1 * rng.standard_normal(6))))]
        )
        assert noise is not None
        found.append(noise.p_alike)
    assert np.mean(np.array(found) < 0.05) == pytest.approx(0.05, abs=0.035)


@pytest.mark.parametrize(("deviations", "resolved"), [(3.0, True), (-3.0, True), (1.0, False), (0.0, False)])
def test_three_standard_errors_are_resolved_and_one_is_not(deviations: float, resolved: bool) -> None:
    noise = known(dense=Spread(0.03, 10), moe=Spread(0.04, 10))
    found = difference(cell("dense", {0: 3.0}), cell("moe", {1: 3.0 - deviations * 0.05}), noise)
    assert found.value == pytest.approx(deviations * 0.05)
    assert found.resolved is resolved
    assert difference(cell("dense", {0: 3.0}), cell("moe", {1: 2.0}), None).resolved is None


def test_more_seeds_make_a_smaller_error() -> None:
    noise = known(dense=Spread(0.03, 10), moe=Spread(0.04, 10))
    found = reach(noise, [("dense", 1 / 4), ("moe", 1 / 2)])
    assert found is not None
    error = math.sqrt(0.03**2 / 4 + 0.04**2 / 2)
    freedom = error**4 / ((0.03**2 / 4) ** 2 / 10 + (0.04**2 / 2) ** 2 / 10)
    assert found == pytest.approx((t_factor(freedom) * error, freedom))
    same = reach(noise, [("dense", 1.0), ("dense", 1.0)])  # one estimate used twice has its freedom once
    assert same == pytest.approx((t_factor(10) * 0.03 * math.sqrt(2), 10))


def test_pairs_of_seeds_cancel_what_a_seed_does_to_both() -> None:
    shift = {0: 0.0, 1: 0.3, 2: -0.2}
    dense, moe = ({s: base + x for s, x in shift.items()} for base in (3.0, 2.95))
    moe[1] -= 0.002
    points = runs("dense", dense) + runs("moe", moe)
    noise = seed_noise(points)
    (found,) = pairings(points)
    assert found.difference.pairs == 3
    assert found.difference.value == pytest.approx(0.05 + 0.002 / 3)
    assert found.difference.resolved
    apart = np.array([0.05, 0.052, 0.05])
    assert found.difference.reach == pytest.approx(t_factor(2) * apart.std(ddof=1) / math.sqrt(3))
    unpaired = difference(cell("dense", dense), cell("moe", {s + 10: x for s, x in moe.items()}), noise)
    assert unpaired.pairs == 0
    assert unpaired.resolved is False
    two = [p for p in points if p.seed != 2]
    assert pairings(two) == []


@pytest.mark.parametrize(("factor", "resolved"), [(0.9, False), (1.1, True), (-1.1, True)])
def test_best_losses_are_compared_with_the_deviations_of_their_families(factor: float, resolved: bool) -> None:
    noise = known(dense=Spread(0.01, 5), moe=Spread(0.03, 5))
    found = reach(noise, [("dense", 1.0), ("moe", 1.0)])
    assert found is not None

    def valley(family: str, floor: float) -> list[Point]:
        sizes = {n: floor + 0.05 * math.log(n / 5e4) ** 2 for n in (2e4, 5e4, 16e4)}
        return [point for n, loss in sizes.items() for point in runs(family, {0: loss}, n)]

    both = profiles([*valley("dense", 3.2), *valley("moe", 3.2 - factor * found[0])])
    both = [replace(profile, minimum=replace(profile.minimum, variance=1.0)) for profile in both]
    (comparison,) = compare(both, {}, noise)
    assert comparison.gap.resolved is resolved
    assert comparison.gap.reach == pytest.approx(found[0])
