"""What include and exclude refuse; tests/launch/test_expansion.py has what they leave."""

from typing import Any

import pytest

from moescale.base.config import validate
from moescale.base.errors import UserError
from moescale.launch.expansion import expand
from moescale.launch.run_keys import matches
from moescale.launch.study_config import StudyConfig

RUN: dict[str, Any] = {
    "data": {"domains": {"stdlib": {"source": "stdlib"}}},
    "training": {"seq": 32, "batch": 2},
    "optimizer": {"lr": 0.01},
}


def names(**group: Any) -> list[str]:
    group = {
        "family": "x",
        "set": {"moe": {"active": 1, "experts": 4, "granularity": 1}},
        "grid": {"model.shape, training.flops": [["d16", 1e9], ["d16", 2e9], ["d32", 2e9]], "training.seed": [0, 1]},
        **group,
    }
    content = {"name": "s", "run": RUN, "groups": {"g": group}}
    return [run.name for run in expand(validate(StudyConfig, content, "study")).runs]


def test_rules_speak_of_swept_and_of_set_keys():
    assert names(exclude=[{"model.shape": "d16", "training.flops": 2e9}, {"training.seed": 1}]) == [
        "x-d16-1e9-s0",
        "x-d32-2e9-s0",
    ]
    assert names(include=[{"training.flops": 1e9}, {"training.seed": [1, 2], "model.shape": "d32"}]) == [
        "x-d16-1e9-s0",
        "x-d16-1e9-s1",
        "x-d32-2e9-s1",
    ]
    assert names(include=[{"moe.experts": 4, "training.seq": 32, "training.seed": 0}]) == names(
        exclude=[{"training.seed": 1}]
    )


def test_values_are_compared_as_yaml_has_them():
    assert matches({"a": 1}, {"a": 1.0})
    assert not matches({"a": 1}, {"a": True})
    assert matches({"a.b": [0.9, 0.95]}, {"a": {"b": [0.9, 0.95]}})
    assert matches({"a.b": [[0.9, 0.95]]}, {"a": {"b": [0.9, 0.95]}})
    assert matches({"a": [None, 1]}, {"a": None})
    assert not matches({"a.b": 1}, {"a": 1})


@pytest.mark.parametrize(
    ("group", "words"),
    [
        ({"exclude": [{"model.shap": "d16"}]}, ["groups.g.exclude: model.shap", "did you mean model.shape"]),
        ({"include": [{"training.steps": 3}]}, ["groups.g.include: training.steps is neither swept nor set"]),
        ({"exclude": [{"model.shape": "d64"}]}, ["model.shape=d64 matches no", "model.shape is d16, d32"]),
        ({"include": [{"model.shape": "d32", "training.flops": 1e9}]}, ["matches no combination"]),
        ({"exclude": [{"training.seed": [0, 1]}]}, ["leave none of the 6 combinations"]),
        ({"exclude": [{}]}, ["groups.g.exclude", "empty mapping"]),
        ({"exclude": {"training.seed": 0}}, ["groups.g.exclude"]),
    ],
)
def test_what_cannot_be_meant_is_refused(group, words):
    with pytest.raises(UserError) as error:
        names(**group)
    for word in words:
        assert word in str(error.value)
