"""Sparsity and granularity: only cells that differ in that alone, and what of it is resolved."""

from dataclasses import replace

import pytest

from moescale.scaling.analysis import analyse
from moescale.scaling.effects import lines_along
from moescale.scaling.findings import findings
from moescale.scaling.points import Point
from moescale.scaling.seeds import seed_noise

SD = 0.02


def run(family: str, loss: float, seed: int = 0, **more: float) -> Point:
    """A model of one shape: 70k parameters that every token uses, routers aside."""
    router = 30.0 * more.get("e", 1) if more.get("e", 1) > 1 else 0.0
    fixed = {"n_total": 70_000 * more.get("e", 1), "n_active": 70_000 + router, "n_router": router, "n_embedding": 5e4}
    kind = {"e": 1.0, "k": 1.0, "g": 1.0, "s": 0.0, "shared": 0.0, "b": 512.0, "lr": 0.01} | more
    name = f"{family} {seed} {sorted(more.items())}"
    return Point(run=name, family=family, seed=seed, d=1e6, c=1e12, loss=loss, **fixed, **kind)  # type: ignore[arg-type]


def mixture(family: str, loss: float, experts: int, active: int, seed: int = 0, **more: float) -> Point:
    return run(family, loss, seed, e=experts, k=active, g=float(active), s=1 - active / experts, **more)


def seeds() -> list[Point]:
    """Eleven seeds of a dense cell at another size with standard deviation SD: ten degrees of freedom."""
    spread = [(-1) ** i * SD * (10 / 11) ** 0.5 * (11 / 10) ** 0.5 for i in range(10)] + [0.0]
    return [
        replace(run("dense", 3.5 + x, i), run=f"noise {i}", n_active=9e4, n_total=9e4) for i, x in enumerate(spread)
    ]


@pytest.mark.parametrize(("deviations", "resolved"), [(3.0, True), (1.0, False)])
def test_three_deviations_of_sparsity_are_resolved_and_one_is_not(deviations: float, resolved: bool) -> None:
    error = SD * 2**0.5
    points = [*seeds(), mixture("E8", 3.3, 16, 2), mixture("E16", 3.3 - deviations * error, 32, 2)]
    noise = seed_noise(points)
    assert noise is not None
    assert noise.pooled.sd == pytest.approx(SD)
    (line,) = lines_along("s", points, noise)
    assert (line.values, line.fixed) == ((0.875, 0.9375), 2.0)
    (step,) = line.steps
    assert step.value == pytest.approx(deviations * error)
    assert step.resolved is resolved
    text = next(s for s in findings(analyse(points, {}, {})) if s.startswith("Higher sparsity"))
    assert ("unresolved" in text) is not resolved


def test_dense_is_no_sparsity_and_granularity_keeps_the_sparsity() -> None:
    points = [run("dense", 3.4), mixture("E8G2", 3.3, 16, 2), mixture("E16G2", 3.2, 32, 2), mixture("E8G4", 3.1, 32, 4)]
    lines = lines_along("s", points, None)
    assert [(line.fixed, [c.family for c in line.cells]) for line in lines] == [
        (2.0, ["dense", "E8G2", "E16G2"]),
        (4.0, ["dense", "E8G4"]),
    ]
    (line,) = lines_along("g", points, None)
    assert (line.fixed, line.values) == (0.875, (2.0, 4.0))
    assert [c.family for c in line.cells] == ["E8G2", "E8G4"]
    assert line.steps[0].value == pytest.approx(0.2)
    assert line.steps[0].resolved is None


@pytest.mark.parametrize("change", [{"b": 1024.0}, {"lr": 0.02}, {"shared": 1.0}, {"c": 3e12}, {"n_embedding": 9e4}])
def test_what_differs_in_more_is_not_compared(change: dict[str, float]) -> None:
    one, other = mixture("E8", 3.3, 16, 2), mixture("E16", 3.2, 32, 2)
    assert len(lines_along("s", [one, other], None)) == 1
    assert lines_along("s", [one, replace(other, **change)], None) == []  # type: ignore[arg-type]


def test_two_families_at_one_level_tell_nothing_about_it() -> None:
    points = [mixture("topk", 3.3, 16, 2), mixture("sinkhorn", 3.2, 16, 2), mixture("E16", 3.2, 32, 2)]
    assert lines_along("s", points, None) == []


def test_without_the_routers_share_shapes_are_unknown() -> None:
    points = [replace(mixture(f, 3.3, e, 2), n_router=None) for f, e in (("E8", 16), ("E16", 32))]
    assert lines_along("s", points, None) == []
