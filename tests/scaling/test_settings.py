"""Grids of batch and learning rate."""

import math
from dataclasses import replace

import numpy as np
import pytest

from moescale.scaling import settings_report
from moescale.scaling.analysis import analyse
from moescale.scaling.optimum_words import setting_ratio
from moescale.scaling.points import Point
from moescale.scaling.seeds import Spread, seed_noise
from moescale.scaling.settings import grids, laws, ratios

RATES, BATCHES = (0.25, 0.5, 1.0, 2.0, 4.0), (128.0, 256.0, 512.0, 1024.0, 2048.0)
SD = 0.003


def grid(family: str, c: float, factor: float = 1.0) -> list[Point]:
    """The best batch is factor * 512 (c / 1e12)^.3, the best rate .01 (c / 1e12)^-.2 (batch / best)^.5; two seeds."""
    rng = np.random.default_rng(int(c) % 1000 + len(family))
    best_b, best_lr = factor * 512 * (c / 1e12) ** 0.3, 0.01 * (c / 1e12) ** -0.2
    found = []
    for b in BATCHES:
        for ratio in RATES:
            lr = 0.01 * ratio
            at = best_lr * (b / best_b) ** 0.5
            loss = 60 * c**-0.1 + 0.03 * math.log(b / best_b) ** 2 + 0.06 * math.log(lr / at) ** 2
            found += [
                Point(f"{family} {c:g} {b} {lr} {seed}", family, seed=seed, n_total=7e4, n_active=7e4, n_embedding=1e5,
                      n_router=0, d=c / 4.2e5, c=c, e=1 if family == "dense" else 8, k=1, g=1, s=0, shared=0, b=b,
                      lr=lr, loss=loss + SD * rng.standard_normal())
                for seed in (0, 1)
            ]  # fmt: skip
    return found


@pytest.fixture(scope="module")
def points() -> list[Point]:
    everything = [point for c in (3e11, 1e12, 3e12) for point in grid("dense", c)]
    return [*everything, *grid("moe", 1e12, 0.5)]


def test_best_batches_rates_and_their_laws_are_recovered(points: list[Point]) -> None:
    noise = seed_noise(points)
    found = grids(points, noise)
    assert [(one.family, len(one.rows)) for one in found] == [("dense", 5)] * 3 + [("moe", 5)]
    middle = found[1]
    assert middle.batch is not None
    assert middle.batch.at == pytest.approx(512, rel=0.1)
    assert middle.rows[2].best.at == pytest.approx(0.01, rel=0.1)
    by_name = {(law.family, law.what, law.over): law.line.power for law in laws(found, noise)}
    batch, rate = by_name["dense", "b", "c"], by_name["dense at 1.0e+12", "lr", "b"]
    assert batch.low is not None
    assert batch.high is not None
    assert batch.low < 0.3 < batch.high
    assert rate.value == pytest.approx(0.5, abs=0.1)
    assert ("moe", "b", "c") not in by_name  # one optimum


def test_a_family_with_half_the_batch_is_told_from_dense(points: list[Point]) -> None:
    noise = seed_noise(points)
    found = ratios(grids(points, noise), noise)
    batch = next(one for one in found if one.what == "b")
    assert batch.value == pytest.approx(0.5, rel=0.15)
    assert batch.resolved
    assert "smaller" in setting_ratio(batch)
    rates = [one for one in found if one.what == "lr" and one.where == 512]
    assert rates[0].value == pytest.approx(2**0.5, rel=0.15)


def test_an_optimum_at_the_edge_is_no_answer(points: list[Point]) -> None:
    """Only the two smallest batches' rates up to their best: nothing brackets anything."""
    few = [p for p in points if (p.b or 0) <= 512 and (p.lr or 0) <= 0.0051]
    noise = seed_noise(points)
    assert grids(few, noise) == []  # two rates make no U
    low = [p for p in points if (p.lr or 0) <= 0.011 and (p.b or 0) >= 512]
    found = ratios(grids(low, noise), noise)
    assert all(one.resolved is None for one in found if one.what == "b")
    assert all("not determined" in setting_ratio(one) for one in found if one.resolved is None)


def test_runs_of_nearly_one_rate_count_once(points: list[Point]) -> None:
    """Two groups that round a rate differently ran each seed twice."""
    twice = [replace(p, run=f"{p.run} again", lr=(p.lr or 0) * 1.000004) for p in points if p.lr == 0.01]
    assert len(grids([*points, *twice], None)[1].rows[2].rates) == 5


def test_a_section_shows_them(points: list[Point]) -> None:
    study = analyse(points, {}, {})
    picture = settings_report.plot(study.grids)
    assert picture is not None
    assert len(picture.rows) == 20
    assert settings_report.blocks(study)
    assert settings_report.plot([]) is None
    assert Spread(SD, 50).sd == pytest.approx(study.noise.pooled.sd if study.noise else 0, rel=0.3)
