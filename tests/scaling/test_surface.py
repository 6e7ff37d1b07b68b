"""Surfaces over size and sparsity, and the frontier of a study."""

import math

import numpy as np
import pytest

from moescale.scaling import surface_report
from moescale.scaling.analysis import analyse
from moescale.scaling.effects import optimum
from moescale.scaling.frontier import frontier
from moescale.scaling.optimum_report import axis_blocks, frontier_blocks, frontier_rows, growth_blocks
from moescale.scaling.points import Point
from moescale.scaling.surface import EDGE, surfaces

SD = 0.002
SPARSITIES = (0.0, 0.5, 0.75, 0.875, 0.9375)


def run(n: float, s: float, c: float, loss: float) -> Point:
    """A dense model, or a mixture of two active experts at G 2, with n total parameters."""
    e = round(2 / (1 - s))
    kind = {"e": 1, "k": 1, "g": 1.0} if s == 0 else {"e": e, "k": 2, "g": 2.0}
    return Point(
        f"{n:g} {s} {c:g}", "dense" if s == 0 else f"E{e // 2}G2", seed=0, n_total=n, n_active=n * (1 - 0.6 * s),
        n_embedding=1e5, n_router=0, d=c / (6 * n), c=c, s=s, shared=0, b=512, lr=0.01, loss=loss, seconds=c / 1e9,
        **kind,
    )  # fmt: skip


def sparse_study(sparsest: float, sizes: tuple[float, ...] = (1e5, 3e5, 1e6, 3e6, 1e7)) -> list[Point]:
    """One budget; the best size is 1e6 / (1 - S)^.5, the best sparsity at that size ``sparsest``."""
    rng = np.random.default_rng(0)
    top = -math.log1p(-sparsest)
    found = []
    for s in SPARSITIES:
        y = -math.log1p(-s)
        for size in sizes:
            n = size * math.exp(0.5 * y)
            loss = 3 + 0.02 * math.log(size / 1e6) ** 2 + 0.03 * (y - top) ** 2
            found.append(run(n, s, 1e15, loss + SD * rng.standard_normal()))
    return found


def test_optima_are_recovered_within_their_intervals() -> None:
    (found,) = surfaces(sparse_study(0.7), None)
    assert found.why == ""
    assert found.points == 25
    assert found.rmse == pytest.approx(SD, rel=0.4)
    assert found.held_s == 0.9375
    assert found.held_error is not None
    assert found.held_error < 10 * SD
    at = {one.fixed: one for one in found.at_s}
    for s in (0.5, 0.75, 0.875):
        size = at[f"S {s:.3g}"].n
        assert size is not None
        assert size.value == pytest.approx(1e6 * (1 - s) ** -0.5, rel=0.05)
    assert found.overall is not None
    assert found.overall.s is not None
    assert found.overall.s.value == pytest.approx(0.7, abs=0.03)
    assert all(one.remark == "" for one in found.at_n)


def test_the_best_sparsity_beyond_the_sparsest_run_is_not_determined() -> None:
    (found,) = surfaces(sparse_study(0.99), None)
    assert found.overall is not None
    assert (found.overall.s, found.overall.remark) == (None, EDGE)
    assert found.at_n[0].s is None


def test_a_size_beyond_the_runs_is_not_determined() -> None:
    (found,) = surfaces(sparse_study(0.7, sizes=(1e4, 3e4, 1e5)), None)
    assert all(one.n is None and one.remark == EDGE for one in found.at_s)


def test_few_places_or_dependent_ones_make_no_surface() -> None:
    (few,) = surfaces(sparse_study(0.7, sizes=(1e6,)), None)
    assert "needs 8" in few.why
    one_line = [run(1e6 * (1 + i) * (1 - s) ** -0.5, s, 1e15, 3.0) for i, s in enumerate(SPARSITIES)]
    assert surfaces(one_line, None)[0].why
    blocks = surface_report.blocks([few])
    assert len(blocks) == 1
    assert surface_report.plot([few]) is None


def test_a_section_shows_surfaces() -> None:
    found = surfaces(sparse_study(0.7), None)
    picture = surface_report.plot(found)
    assert picture is not None
    assert len(picture.rows) == 25
    assert len(surface_report.blocks(found)) == 3


def test_the_frontier_of_a_study_with_interior_minima() -> None:
    points = [
        run(n, s, c, 20 * c**-0.07 - 0.1 * s + 0.05 * math.log(f) ** 2)
        for s in (0.0, 0.75)
        for c in (1e11, 3e11, 1e12)
        for f in (0.25, 0.5, 1.0, 2.0, 4.0)
        for n in [f * 0.1 * c**0.45 * (1 + s)]
    ]
    study = analyse(points, {}, {})
    rows, missing = frontier(study, [3e11, 1e14])
    assert missing == []
    assert [row.family for row in rows] == ["dense", "E4G2", "dense", "E4G2"]
    inside, far = rows[1], rows[3]
    assert inside.n_active.value == pytest.approx(0.1 * 3e11**0.45 * 1.75 * (1 - 0.6 * 0.75), rel=0.02)
    assert inside.n_total == pytest.approx(0.1 * 3e11**0.45 * 1.75, rel=0.02)
    assert inside.d == pytest.approx(3e11 / (6 * inside.n_total), rel=0.02)
    assert (inside.e, inside.k, inside.g, inside.s, inside.b, inside.lr) == (8, 2, 2.0, 0.75, 512, 0.01)
    assert inside.hours == pytest.approx(3e11 / 1e9 / 3600)
    assert any("extrapolated: 1e+02 x" in text for text in far.remarks)
    assert not any("extrapolated" in text for text in inside.remarks)
    assert all("no power law of optima" in " ".join(row.remarks) for row in rows)
    assert len(frontier_rows(rows)[0]) == 14
    assert frontier_blocks(study)
    assert growth_blocks(study)


def test_a_family_without_interior_minima_is_named() -> None:
    points = [run(n, 0.0, c, 3 + 0.1 * math.log(n)) for c in (1e11, 3e11, 1e12) for n in (1e5, 2e5, 4e5)]
    rows, missing = frontier(analyse(points, {}, {}), [1e12])
    assert rows == []
    assert "dense: no optimal size" in missing[0]


def test_the_best_sparsity_at_fixed_active_size() -> None:
    points = [
        Point(f"{s} {seed}", "dense" if s == 0 else f"E{round(1 / (1 - s))}", seed=seed, n_total=1e5 / (1 - s),
              n_active=1e5, n_embedding=1e5, n_router=0, d=1e6, c=1e12, e=1 if s == 0 else round(2 / (1 - s)),
              k=1 if s == 0 else 2, g=1 if s == 0 else 2, s=s, shared=0, b=512, lr=0.01,
              loss=3 + 0.02 * (-math.log1p(-s) - 1.4) ** 2 + 1e-4 * seed)
        for s in SPARSITIES
        for seed in (0, 1)
    ]  # fmt: skip
    study = analyse(points, {}, {})
    (line,) = study.sparsity
    best = optimum(line, study.noise)
    assert best is not None
    assert 1 - 1 / best.at == pytest.approx(1 - math.exp(-1.4), abs=0.01)
    assert axis_blocks("s", study)
    assert axis_blocks("g", study) == []
