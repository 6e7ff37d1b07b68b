"""The learning-rate check."""

import math
from dataclasses import replace

import pytest

from moescale.scaling.analysis import analyse
from moescale.scaling.findings import findings, warnings_of
from moescale.scaling.points import Point
from moescale.scaling.rates import rate_checks
from moescale.scaling.seeds import seed_noise


def base(family: str, loss: float, seed: int = 0) -> Point:
    return Point(run=f"{family} {seed}", family=family, seed=seed, n_total=5e4, n_active=5e4, d=1e6, c=1e12, b=512,
                 lr=0.01, loss=loss)  # fmt: skip


def other(family: str, ratio: float, loss: float | None) -> Point:
    state = "done" if loss is not None else "failed"
    return replace(base(family, 0.0), run=f"{family} x{ratio}", check="lr", lr=0.01 * ratio, loss=loss, state=state)


SEEDS = [base("dense", 3.00), base("dense", 3.02, 1), base("dense", 2.98, 2)]


def test_the_parabola_is_found_and_the_rule_confirmed() -> None:
    curve = {ratio: 2.99 + 0.05 * math.log(ratio / 1.2) ** 2 for ratio in (0.5, 2.0)}
    points = [*SEEDS, other("dense", 0.5, curve[0.5]), other("dense", 2.0, curve[2.0])]
    points[0] = replace(points[0], loss=2.99 + 0.05 * math.log(1 / 1.2) ** 2)
    (check,) = rate_checks(points, seed_noise(points))
    assert check.ratios == (0.5, 1.0, 2.0)
    assert check.parabola is not None
    assert math.exp(-check.parabola[1] / (2 * check.parabola[0])) == pytest.approx(1.2)
    assert (check.best_ratio, check.excess, check.refuted, check.bracketed) == (1.0, 0.0, False, True)
    study = analyse(points, {}, {})
    assert any("The rule's learning rate is the best of the 3 tried for dense" in text for text in findings(study))
    assert warnings_of(study) == []


def test_a_better_rate_beyond_seed_noise_is_a_warning() -> None:
    points = [*SEEDS, other("dense", 0.5, 3.2), other("dense", 2.0, 2.7)]
    (check,) = rate_checks(points, seed_noise(points))
    assert check.excess == pytest.approx(0.3)
    assert check.refuted
    assert not check.bracketed
    study = analyse(points, {}, {})
    (warning,) = warnings_of(study)
    assert "2 times the rule's learning rate is better by 0.300 nats/token" in warning
    assert warning in findings(study)
    assert not any("is the best of" in text for text in findings(study))


def test_a_better_rate_within_seed_noise_is_told_with_its_size() -> None:
    points = [*SEEDS, other("dense", 0.5, 3.2), other("dense", 2.0, 2.99)]
    texts = findings(analyse(points, {}, {}))
    assert any("within 0.010 nats/token (within seed noise) of the best of the 3 tried for dense" in t for t in texts)
    assert any("at an end of the rates tried for dense (best at 2 x)" in t for t in texts)


def test_a_rate_that_failed_is_shown_without_a_loss() -> None:
    points = [SEEDS[0], other("dense", 0.5, 3.1), other("dense", 4.0, None)]
    (check,) = rate_checks(points, None)
    assert check.losses == (3.1, 3.0, None)
    assert (check.parabola, check.reach, check.refuted) == (None, None, False)


@pytest.mark.parametrize("change", [{"seed": 7}, {"family": "moe"}, {"n_active": 9e4}, {"c": 3e12}, {"b": 64}])
def test_only_the_same_run_is_a_base(change: dict[str, object]) -> None:
    points = [*SEEDS, replace(other("dense", 0.5, 3.2), **change)]  # type: ignore[arg-type]
    assert rate_checks(points, None) == []
    assert len(rate_checks([*SEEDS, other("dense", 0.5, 3.2)], None)) == 1
