"""Noise scale over loss: laws and ratios that are put in come out, and what is not there is not claimed."""

from typing import Any

import numpy as np
import pytest

from moescale.scaling.gradient_noise import batch_laws, measurements, noise_ratios
from moescale.scaling.points import Point
from moescale.scaling.record import Record

LOSSES = np.linspace(5.0, 3.0, 60)


def step(loss: float, scale: float, expert: bool, rng: np.random.Generator) -> dict[str, Any]:
    g2 = 1.0 + 0.1 * rng.standard_normal()
    parts = {"g2": g2, "trace": scale, "b_simple": scale / g2}
    return {
        "loss": loss,
        "batch_tokens": 512,
        "noise": {"all": parts, "dense": parts, "expert": parts if expert else None},
    }


def study(ratio: float = 1.0, power: float = 4.0, losses: np.ndarray = LOSSES) -> tuple[list[Point], dict[str, Record]]:
    """Dense and a mixture with B = 5e6 / L^power, the mixture's ``ratio`` times it."""
    rng = np.random.default_rng(0)
    records = {
        family: Record(steps=[step(x, times * 5e6 / x**power, family != "dense", rng) for x in losses])
        for family, times in (("dense", 1.0), ("moe", ratio))
    }
    return [Point(run=family, family=family) for family in records], records


def test_a_run_is_measured_in_six_parts_for_each_set_of_parameters() -> None:
    found = measurements(*study())
    assert {(m.point.run, m.kind): 0 for m in found}.keys() == {
        ("dense", "all"), ("moe", "all"), ("moe", "dense"), ("moe", "expert"),
    }  # fmt: skip
    assert len(found) == 24
    assert {m.average.n for m in found} == {10}
    assert {m.batch for m in found} == {512}


def test_a_power_law_of_loss_is_recovered() -> None:
    laws = {law.family: law for law in batch_laws(measurements(*study()))}
    assert set(laws) == {"dense", "moe"}
    for law in laws.values():
        assert law.resolved
        assert law.low <= 4.0 <= law.high
        assert law.scale == pytest.approx(5e6, rel=0.5)


def test_a_flat_noise_scale_gives_no_law_and_few_losses_none_at_all() -> None:
    assert not any(law.resolved for law in batch_laws(measurements(*study(power=0.0))))
    assert batch_laws(measurements(*study(losses=LOSSES[:3]))) == []
    assert noise_ratios(measurements(*study(losses=LOSSES[:2]))) == []


@pytest.mark.parametrize(("ratio", "resolved"), [(0.5, True), (2.0, True), (1.0, False)])
def test_the_ratio_at_equal_loss_is_recovered(ratio: float, resolved: bool) -> None:
    (found,) = noise_ratios(measurements(*study(ratio)))
    assert found.low <= ratio * 1.02
    assert found.high >= ratio * 0.98
    assert found.resolved is resolved


def test_unusable_measurements_are_left_out() -> None:
    points, records = study()
    for line in records["moe"].steps:
        line["noise"]["all"]["g2"] = -1.0
    found = measurements(points, records)
    assert noise_ratios(found) == []
    assert [law.family for law in batch_laws(found)] == ["dense"]
    records["moe"].steps[:] = [{**line, "noise": None} for line in records["moe"].steps]
    assert {m.point.run for m in measurements(points, records)} == {"dense"}
