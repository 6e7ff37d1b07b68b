"""Expansion of study files: no run twice, none missing, names that do not depend on the order of anything."""

import itertools
import random
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moescale.base.config import validate
from moescale.base.errors import UserError
from moescale.base.yaml_text import parse_yaml
from moescale.launch.expansion import expand
from moescale.launch.run_keys import number
from moescale.launch.study_config import StudyConfig

COMMON: dict[str, Any] = {
    "model": {"shape": "d16"},
    "data": {"domains": {"stdlib": {"source": "stdlib"}}},
    "training": {"seq": 32, "batch": 2, "steps": 4},
    "optimizer": {"lr": 0.01},
}
AXES: dict[str, list[Any]] = {
    "model.shape": ["d16", "d32", "d48"],
    "training.seed": [0, 1, 2],
    "training.batch": [2, 4, 8],
    "optimizer.lr": [0.001, 0.01, 0.02],
    "eval.every": [0, 5],
    "optimizer.betas": [[0.9, 0.95], [0.9, 0.99]],
}


def study(groups: dict[str, Any], **more: Any) -> StudyConfig:
    return validate(StudyConfig, {"name": "s", "run": COMMON, "groups": groups, **more}, "study")


grids = st.dictionaries(st.sampled_from(sorted(AXES)), st.none(), min_size=1, max_size=4).flatmap(
    lambda keys: st.fixed_dictionaries(
        {key: st.lists(st.sampled_from(AXES[key]), min_size=1, max_size=3, unique_by=repr) for key in keys}
    )
)


@settings(max_examples=40, deadline=None)
@given(grids)
def test_every_combination_once(grid):
    runs = expand(study({"g": {"family": "dense", "grid": grid}})).runs
    expected = 1
    for values in grid.values():
        expected *= len(values)
    assert len(runs) == expected
    assert len({run.config.scientific_hash for run in runs}) == expected
    assert len({run.name.casefold() for run in runs}) == expected
    for run in runs:
        assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", run.name)
        assert run.config.name == run.name


rules = st.lists(
    st.dictionaries(st.sampled_from(sorted(AXES)), st.none(), min_size=1, max_size=2).flatmap(
        lambda keys: st.fixed_dictionaries(
            {key: st.sampled_from(AXES[key]) | st.lists(st.sampled_from(AXES[key]), min_size=1) for key in keys}
        )
    ),
    max_size=2,
)


@settings(max_examples=60, deadline=None)
@given(grids, rules, rules)
def test_rules_leave_what_a_loop_would(grid, include, exclude):
    def allowed(values: dict[str, Any], rule: dict[str, Any]) -> bool:
        # An axis of lists is compared with the rule's value first: [0.9, 0.95] is one value of optimizer.betas.
        return all(
            values[key] == wanted or (isinstance(wanted, list) and values[key] in wanted)
            for key, wanted in rule.items()
        )

    product = [dict(zip(grid, choice, strict=True)) for choice in itertools.product(*grid.values())]
    given_keys = {*grid, "model.shape", "training.batch", "optimizer.lr"}
    asked = study({"g": {"family": "dense", "grid": grid, "include": include, "exclude": exclude}})
    defaults = {"model.shape": "d16", "training.batch": 2, "optimizer.lr": 0.01}
    every = [{**defaults, **values} for values in product]
    sound = all(rule.keys() <= given_keys and any(allowed(v, rule) for v in every) for rule in (*include, *exclude))
    if sound:
        expected = [
            values
            for values in every
            if (not include or any(allowed(values, rule) for rule in include))
            and not any(allowed(values, rule) for rule in exclude)
        ]
    if not sound or not expected:
        with pytest.raises(UserError, match=r"groups\.g"):
            expand(asked)
        return
    found = [run.config.model_dump() for run in expand(asked).runs]

    def at(config: dict[str, Any], key: str) -> Any:
        section, name = key.split(".")
        value = config[section][name]
        return list(value) if isinstance(value, tuple) else value

    keys = sorted({*grid, *defaults})
    in_order = sorted(repr([at(config, key) for key in keys]) for config in found)
    assert in_order == sorted(repr([values[key] for key in keys]) for values in expected)


@settings(max_examples=25, deadline=None)
@given(grids, st.sampled_from(sorted(AXES)), st.data())
def test_an_axis_of_one_value_elsewhere_renames_nothing(grid, axis, data):
    moe = {"moe.experts": 8, "moe.active": 2, "moe.granularity": 2}
    other = {"family": "E8", "set": moe, "grid": {"training.seed": [0, 1]}}
    value = data.draw(st.sampled_from(AXES[axis]))
    wider = {**other, "grid": {axis: [value], **{k: v for k, v in other["grid"].items() if k != axis}}}
    ours = {"family": "dense", "grid": grid}

    def names(groups: dict[str, Any]) -> set[str]:
        return {run.name for run in expand(study(groups)).runs if run.family == "dense"}

    assert names({"a": ours, "b": other}) == names({"b": wider, "a": ours}) == names({"a": ours})


@settings(max_examples=25, deadline=None)
@given(grids, grids, st.randoms(use_true_random=False))
def test_names_do_not_depend_on_order(first, second, order: random.Random):
    def shuffled(grid: dict[str, list[Any]]) -> dict[str, list[Any]]:
        keys = order.sample(sorted(grid), len(grid))
        return {key: order.sample(grid[key], len(grid[key])) for key in keys}

    moe = {"moe.experts": 8, "moe.active": 2, "moe.granularity": 2}
    groups = {
        "one": {"family": "dense", "grid": first},
        "two": {"family": "E8", "set": moe, "grid": second},
    }
    again = {
        "two": {"family": "E8", "set": dict(reversed(moe.items())), "grid": shuffled(second)},
        "one": {"family": "dense", "grid": shuffled(first)},
    }
    assert expand(study(groups)) == expand(study(again))


def test_names_are_readable():
    grid = {"training.seed": [0, 1], "model.shape": ["d48"], "training.flops, training.batch": [[1e11, 2], [3e11, 4]]}
    runs = expand(
        study(
            {"moe": {"family": "E8G4", "set": {"moe": {"experts": 32, "active": 4, "granularity": 4}}, "grid": grid}},
            run={**COMMON, "training": {"seq": 32}},
        )
    ).runs
    assert [run.name for run in runs] == [
        "E8G4-d48-1e11-s0",
        "E8G4-d48-1e11-s1",
        "E8G4-d48-3e11-s0",
        "E8G4-d48-3e11-s1",
    ]
    assert [run.config.training.batch for run in runs] == [2, 2, 4, 4]


def test_a_new_group_renames_nothing():
    main = {"family": "dense", "grid": {"model.shape": ["d16", "d32"]}}
    before = expand(study({"main": main})).runs
    after = expand(study({"main": main, "lr": {"family": "dense", "grid": {"optimizer.lr": [0.005, 0.02]}}})).runs
    assert {run.name for run in before} < {run.name for run in after}


def test_overlapping_groups_share_a_run():
    runs = expand(
        study(
            {
                "sizes": {"family": "dense", "grid": {"model.shape": ["d16", "d32"]}},
                "rates": {"family": "dense", "grid": {"optimizer.lr": [0.01, 0.02]}},
            }
        )
    ).runs
    assert [run.name for run in runs] == ["dense-d16-4steps-lr0.02-s0", "dense-d16-4steps-s0", "dense-d32-4steps-s0"]
    assert runs[1].groups == ("rates", "sizes")


def test_one_impossible_combination_keeps_the_others():
    groups = {"a": {"family": "x", "grid": {"model.heads": [1, 2, 3], "training.seed": [0, 1]}}}
    found = expand(study(groups))
    assert [run.name for run in found.runs] == [f"x-d16-4steps-model.heads{h}-s{s}" for h in (1, 2) for s in (0, 1)]
    assert [run.name for run in found.impossible] == [f"x-d16-4steps-model.heads3-s{seed}" for seed in (0, 1)]
    assert "model.heads (3) must divide model.width (16)" in found.impossible[0].reason
    twice = expand(study({**groups, "b": {"family": "x", "grid": {"model.heads": [1, 3]}}}))
    assert [run.groups for run in twice.impossible] == [("a", "b"), ("a",)]


@pytest.mark.parametrize("value", ["2020-01-01", ".nan", "{a: .inf}", "[]"])
def test_whatever_the_value_a_name_is_found(value):
    groups = {"a": {"family": "x", "grid": {"training.seed": [0, parse_yaml(value, "test")]}}}
    assert len(expand(study(groups)).impossible) == 1


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ({"a": {"family": "x", "grid": {"training.seed": [1, 1]}}}, ["groups.a", "training.seed=1", "same run"]),
        ({"a": {"family": "x"}, "b": {"family": "y"}}, ["groups.a", "groups.b", "family x", "family y"]),
        (
            {"a": {"family": "x"}, "b": {"family": "x", "set": {"optimizer.lr": 0.02}}},
            ["groups.a", "groups.b", "optimizer.lr"],
        ),
        (
            {"a": {"family": "x"}, "b": {"family": "x", "set": {"logging.tensorboard": False}}},
            ["groups.a", "groups.b", "logging.tensorboard"],
        ),
        ({"a": {"family": "x", "grid": {"model.widht": [16]}}}, ["groups.a", "model.widht=16", "did you mean width"]),
        ({"a": {"family": "x", "set": {"moe.experts": 4, "moe.active": 8, "moe.granularity": 1}}}, ["moe.active (8)"]),
        ({"a": {"family": "x", "grid": {"training.seed": []}}}, ["groups.a", "training.seed", "no values"]),
        ({"a": {"family": "x", "grid": {"a, b": [[1]]}}}, ["a, b", "list of 2"]),
        ({"a": {"family": "x", "grid": {"a": [1], "b, a": [[1, 2]]}}}, ["swept by two axes"]),
        ({"a": {"family": "x", "grid": {"moe": [{}], "moe.experts": [1]}}}, ["same setting"]),
        ({"a": {"family": "x", "set": {"training.seed": 1}, "grid": {"training.seed": [1]}}}, ["stands in grid"]),
        ({"a": {"family": "x", "set": {"name": "mine"}}}, ["set.name"]),
        ({"a": {"family": "x/y"}}, ["groups.a.family"]),
    ],
)
def test_wrong_groups_are_explained(groups, words):
    with pytest.raises(UserError) as error:
        expand(study(groups))
    for word in words:
        assert word in str(error.value)


def test_learning_rate_rule():
    rule = {"base_lr": 0.01, "base_width": 64}
    without = {key: value for key, value in COMMON.items() if key != "optimizer"}
    groups = {
        "sizes": {"family": "dense", "grid": {"model.shape": ["d16", "d48"]}},
        "given": {"family": "dense", "grid": {"optimizer.lr": [0.5]}},
    }
    runs = {run.name: run.config for run in expand(study(groups, run=without, lr_rule=rule)).runs}
    assert runs["dense-d16-4steps-s0"].optimizer.lr == 0.04
    assert runs["dense-d48-4steps-s0"].optimizer.lr == 0.0133333
    assert runs["dense-d16-4steps-lr0.5-s0"].optimizer.lr == 0.5
    with pytest.raises(UserError, match=r"lr_rule and run\.optimizer\.lr"):
        study(groups, lr_rule=rule)


@given(st.floats(min_value=1e-300, max_value=1e300))
def test_number_reads_back(value):
    assert float(number(value)) == value


def test_number_is_short():
    assert [number(v) for v in (1e12, 3e11, 0.01, 256.0, 1.5e11, 123456789.0)] == [
        "1e12", "3e11", "0.01", "256", "1.5e11", "123456789",
    ]  # fmt: skip
