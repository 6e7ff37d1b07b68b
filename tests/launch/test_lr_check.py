"""Runs that check the learning-rate rule."""

from typing import Any

import pytest

from moescale.base.config import validate
from moescale.base.errors import UserError
from moescale.launch.expansion import expand
from moescale.launch.plan import plan_study
from moescale.launch.plan_table import render
from moescale.launch.planned import Expansion
from moescale.launch.study_config import StudyConfig

MOE = {"moe": {"active": 2, "experts": 8, "granularity": 2}}


def study(groups: dict[str, Any], at: dict[str, Any], **more: Any) -> StudyConfig:
    content = {
        "name": "s",
        "run": {
            "data": {"domains": {"stdlib": {"source": "stdlib"}}},
            "training": {"seq": 32, "batch": 2},
            "model": {"shape": "d16"},
        },
        "lr_rule": {"base_lr": 0.01, "base_width": 64, "power": 1.0, "check": {"at": at, "factors": [0.5, 2]}},
        "groups": groups,
        **more,
    }
    return validate(StudyConfig, content, "study")


def checks(found: Expansion) -> dict[str, float]:
    return {run.name: run.config.optimizer.lr for run in found.runs if run.check == "lr"}


def test_one_run_of_each_family_at_other_rates():
    grid = {"model.shape": ["d32", "d48"], "training.flops": [1e9, 2e9], "training.seed": [3, 1, 2]}
    groups = {
        "dense": {"family": "dense", "grid": grid},
        "moe": {"family": "E8", "set": MOE, "grid": grid},
        "small": {"family": "small", "set": {"moe": {**MOE["moe"], "experts": 4}, "training.flops": 1e9}},
    }
    asked = study(groups, {"model.shape": "d48", "training.flops": 2e9})
    found = expand(asked)
    rates = {"lr0.00666667": 0.00666667, "lr0.0266667": 0.0266667}
    assert checks(found) == {f"{family}-d48-2e9-{lr}-s1": rates[lr] for family in ("dense", "E8") for lr in rates}
    assert len(found.runs) == 25 + 4
    assert [w for w in found.warnings if "family small" in w and "model.shape=d48" in w] == list(found.warnings)

    plan = plan_study(asked, found)
    assert [row.name for row in plan.rows if row.check] == sorted(checks(found))
    assert set(found.warnings) <= set(plan.warnings)
    assert "check" in [column.header for column in render(plan).columns]
    assert sum(row["check"] == "lr" for row in plan.as_json()["runs"]) == 4


def test_a_rate_that_is_swept_anyway_is_no_check():
    groups = {
        "rule": {"family": "dense", "set": {"training.steps": 9}},
        "swept": {"family": "dense", "set": {"training.steps": 9}, "grid": {"optimizer.lr": [0.02, 0.03]}},
    }
    found = expand(study(groups, {"training.steps": 9}))
    assert checks(found) == {"dense-d16-9steps-lr0.08-s0": 0.08}
    assert {run.name: run.check for run in found.runs}["dense-d16-9steps-lr0.02-s0"] == ""


def test_runs_with_a_rate_of_their_own_say_nothing_about_the_rule():
    groups = {"own": {"family": "dense", "set": {"training.steps": 9, "optimizer.lr": 0.02}}}
    found = expand(study(groups, {"training.steps": 9}))
    assert not checks(found)
    assert "family dense has no run with a learning rate by the rule" in found.warnings[0]


@pytest.mark.parametrize(
    ("at", "words"),
    [
        ({"training.flop": 1e9}, ["lr_rule.check.at: training.flop", "did you mean training.flops"]),
        ({"training.flops": 7e9}, ["matches no combination", "training.flops is 1e9"]),
    ],
)
def test_a_check_of_nothing_is_refused(at, words):
    with pytest.raises(UserError) as error:
        expand(study({"a": {"family": "dense", "set": {"training.flops": 1e9}}}, at))
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("factors", [[], [1], [0.5, 0.5], [0], [-2]])
def test_factors(factors):
    with pytest.raises(UserError, match=r"lr_rule\.check\.factors"):
        study(
            {"a": {"family": "dense"}},
            {},
            lr_rule={"base_lr": 1, "base_width": 1, "check": {"at": {"training.seed": 0}, "factors": factors}},
        )
