"""Learning rates, decay branches, and what a budget buys."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moescale.base.config import validate
from moescale.base.errors import UserError
from moescale.training.budget import flops_per_step, steps_of, tokens_per_step
from moescale.training.config import RunConfig
from moescale.training.schedule import branch_steps, decay_start, learning_rate, warmup_steps

PEAK = 0.02


def config(schedule: dict[str, Any] | None = None, training: dict[str, Any] | None = None, **more: Any) -> RunConfig:
    content = {
        "model": {"shape": "d32"},
        "data": {"domains": {"words": {"files": ["*.txt"]}}, "samples": 4000},
        "optimizer": {"lr": PEAK},
        "schedule": schedule or {},
        "training": {"seq": 32, "batch": 4, "steps": 100, **(training or {})},
        **more,
    }
    return validate(RunConfig, content, "run.yaml")


def rates(schedule: dict[str, Any], steps: int) -> list[float]:
    """Of steps 1 to ``steps``."""
    run = config(schedule)
    return [learning_rate(run, step, steps) for step in range(1, steps + 1)]


def test_constant() -> None:
    assert rates({"kind": "constant", "warmup": 0}, 5) == [PEAK] * 5


def test_warmup_is_linear_to_the_peak() -> None:
    for warmup, steps in ((4, 20), (0.2, 20)):
        for kind in ("constant", "cosine", "wsd"):
            found = rates({"kind": kind, "warmup": warmup}, steps)
            assert found[:4] == pytest.approx([PEAK / 4, PEAK / 2, 3 * PEAK / 4, PEAK])
            assert max(found) == found[3] == PEAK
    assert warmup_steps(config({"warmup": 0.049}).schedule, 100) == 5
    assert warmup_steps(config({"warmup": 1}).schedule, 100) == 1


def test_cosine() -> None:
    found = rates({"kind": "cosine", "warmup": 10, "min_ratio": 0.1}, 110)
    assert found[59] == pytest.approx(PEAK * 0.55)  # half way down
    assert found[-1] == pytest.approx(PEAK * 0.1)
    assert all(after < before for before, after in zip(found[9:], found[10:], strict=False))
    quarter = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4))
    assert found[34] == pytest.approx(PEAK * quarter)


def test_wsd() -> None:
    found = rates({"kind": "wsd", "warmup": 10, "decay": 0.2, "min_ratio": 0.1}, 100)
    assert found[9:80] == [PEAK] * 71
    assert found[80] == pytest.approx(PEAK * (1 - 0.9 / 20))
    assert found[89] == pytest.approx(PEAK * 0.55)
    assert found[-1] == pytest.approx(PEAK * 0.1)
    to_zero = rates({"kind": "wsd", "warmup": 0, "decay": 0.5, "min_ratio": 0}, 10)
    assert to_zero[4:] == pytest.approx([PEAK * share for share in (1, 0.8, 0.6, 0.4, 0.2, 0)])


@given(st.integers(2, 400), st.floats(0.01, 1), st.floats(0, 1), st.sampled_from(["constant", "cosine", "wsd"]))
def test_rates_stay_between_zero_and_the_peak(steps: int, decay: float, warmup: float, kind: str) -> None:
    found = rates({"kind": kind, "warmup": warmup if warmup < 1 else 1, "decay": decay}, steps)
    assert len(found) == steps
    assert all(0 < rate <= PEAK * (1 + 1e-12) for rate in found)


@given(st.integers(40, 200), st.integers(40, 400), st.integers(0, 8), st.floats(0.05, 0.6))
def test_branches_share_the_trunks_prefix_exactly(branch: int, trunk: int, warmup: int, decay: float) -> None:
    """Bit for bit up to the step where the branch starts, and lower from the next step on."""
    schedule = {"kind": "wsd", "warmup": warmup, "decay": decay}
    trunk = max(trunk, 2 * branch)
    start = decay_start(config(schedule).schedule, branch)
    shared = min(start, decay_start(config(schedule).schedule, trunk))
    along, down = rates(schedule, trunk), rates(schedule, branch)
    assert down[:shared] == along[:shared]
    assert 1 <= start < branch
    assert down[start] < PEAK


def test_branch_steps() -> None:
    run = config({"kind": "wsd", "warmup": 10, "decay": 0.25, "branches": [40, 80]}, {"steps": 200})
    assert branch_steps(run) == {30: 40, 60: 80}
    assert branch_steps(config()) == {}


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        ({"kind": "cosine", "branches": [40]}, "need schedule.kind wsd, not cosine"),
        ({"parent": {"run": "trunk", "step": 3}}, "need schedule.kind wsd, not cosine"),
        ({"kind": "wsd", "branches": [40]}, r"schedule.warmup \(0.05\): .* give it in steps"),
        ({"kind": "wsd", "warmup": 2.5}, r"schedule.warmup \(2.5\): a number of steps must be whole"),
        ({"kind": "linear"}, r"schedule.kind \('linear'\)"),
        ({"decay": 0}, r"schedule.decay \(0\)"),
    ],
)
def test_schedules_that_are_refused(schedule: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        config(schedule)


def test_budgets() -> None:
    assert tokens_per_step(config()) == 128
    assert steps_of(config(), vocab=300) == 100
    assert steps_of(config(training={"steps": None, "tokens": 1e4}), vocab=300) == 78
    per_step = flops_per_step(config(), vocab=300)
    assert steps_of(config(training={"steps": None, "flops": 50.4 * per_step}), vocab=300) == 50


@pytest.mark.parametrize(
    ("training", "said"),
    [
        ({"tokens": 1e4}, r"exactly one of tokens, flops, steps \(given: tokens, steps\)"),
        ({"steps": None}, r"exactly one of tokens, flops, steps \(given: none\)"),
    ],
)
def test_one_budget(training: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        config(training=training)


@pytest.mark.parametrize(
    ("training", "said"),
    [
        ({"steps": None, "tokens": 50}, r"training.tokens \(50\) is below one batch \(128\); .* training.batch \(4\)"),
        ({"steps": None, "flops": 1e3}, r"training.flops \(1000\) is below one batch"),
        (
            {"steps": 1001},
            r"data.samples \(4000\) is less than the 1001 steps x 4 sequences .* raise it to at least 4004",
        ),
    ],
)
def test_budgets_that_cannot_be(training: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        steps_of(config(training=training), vocab=300)
