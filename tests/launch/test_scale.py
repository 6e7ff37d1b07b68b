"""A study made for a cluster, at a millionth of its compute."""

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moescale.base.config import merge, validate
from moescale.base.errors import UserError
from moescale.launch.expansion import Expansion, expand
from moescale.launch.plan import plan_study
from moescale.launch.study_config import StudyConfig, load_study
from moescale.models.config import ModelConfig
from moescale.models.counts import count_parameters
from moescale.training.budget import steps_of
from moescale.training.schedule import warmup_steps

CLUSTER: dict[str, Any] = {
    "name": "cluster",
    "run": {
        "data": {"domains": {"stdlib": {"source": "stdlib"}}, "samples": 1 << 40},
        "training": {"seq": 2048, "batch": 256, "dtype": "bf16", "micro_batch": 4},
        "parallel": {"tensor": 4, "expert": 2},
        "checkpoint": {"every": 500},
    },
    "lr_rule": {"base_lr": 0.01, "base_width": 64},
    "groups": {
        "dense": {
            "family": "dense",
            "grid": {"model.shape": ["125M", "350M", "1.4B"], "training.flops": [1e18, 1e19]},
        },
        "moe": {
            "family": "E8",
            "set": {"moe": {"active": 2, "experts": 8, "granularity": 2}, "training.tokens": 1e10},
            "grid": {"model.shape": ["125M", "350M"]},
        },
    },
}


def expanded(scale: float, **more: Any) -> Expansion:
    return expand(validate(StudyConfig, merge(CLUSTER, {"scale": scale, **more}), "study"))


def test_flops_tokens_parameters_batch_and_layout():
    rungs = {"125M": "d48", "350M": "d96", "1.4B": "d128"}
    assert sorted(run.name for run in expanded(1e-6).runs) == sorted(
        run.name.replace(str(run.config.model.shape), rungs[str(run.config.model.shape)])
        .replace("1e18", "1e12")
        .replace("1e19", "1e13")
        .replace("1e10tok", "1e7tok")
        for run in expanded(1.0).runs
    )
    for large, small in rungs.items():
        counts = [
            count_parameters(ModelConfig.model_validate({"shape": shape}), None, 1024).total for shape in (large, small)
        ]
        assert abs(math.log(1e-3 * counts[0] / counts[1])) < math.log(1.6)
    for run in expanded(1e-6).runs:
        config = run.config
        assert run.name.split("-")[1] == config.model.shape
        assert config.training.flops in (1e12, 1e13, None)
        assert config.training.tokens in (1e7, None)
        assert config.training.batch == round(256 * 1e-2)
        assert config.training.micro_batch is None
        assert (config.parallel.tensor, config.parallel.expert) == (1, 1)
        assert (config.training.seq, config.training.dtype) == (2048, "bf16")


@settings(max_examples=30, deadline=None)
@given(
    st.floats(1e-8, 1),
    st.sampled_from([1, 3, 8, 100, 512]),
    st.sampled_from([None, 1, 2, 4, 7, 16]),
    st.sampled_from([0, 10]),
)
def test_a_small_batch_divides_the_shrunk_one(scale: float, batch: int, small: int | None, every: int):
    if small is not None and (small >= batch or batch % small):
        small = None
    every = every if batch > 1 else 0
    run = {
        **CLUSTER["run"],
        "training": {"seq": 64, "batch": batch, "steps": 1000},
        "model": {"shape": "1.4B"},
        "noise": {"every": every, "small_batch": small if every else None},
    }
    content = {"name": "s", "run": run, "lr_rule": CLUSTER["lr_rule"], "groups": {"a": {"family": "a"}}}
    (found,) = expand(validate(StudyConfig, {**content, "scale": scale}, "study")).runs
    shrunk = found.config.training.batch
    if every:
        assert 1 <= found.config.small_batch < shrunk
        assert shrunk % 2 == 0 or scale == 1
    assert abs(shrunk - scale ** (1 / 3) * batch) <= 2
    tokens = found.config.training.steps * shrunk
    assert tokens == pytest.approx(math.sqrt(scale) * 1000 * batch, abs=shrunk)


@pytest.mark.parametrize("budget", [{"flops": 3e18}, {"tokens": 2e9}, {"steps": 4000}])
def test_warm_up_in_steps_keeps_its_share(budget: dict[str, float]):
    run = merge(CLUSTER["run"], {"training": budget, "schedule": {"warmup": 200}, "model": {"shape": "350M"}})
    content = {"name": "s", "run": run, "lr_rule": CLUSTER["lr_rule"], "groups": {"a": {"family": "a"}}}
    shares = []
    for scale in (1.0, 1e-6):
        (found,) = expand(validate(StudyConfig, {**content, "scale": scale}, "study")).runs
        steps = steps_of(found.config, 1024)
        shares.append(warmup_steps(found.config.schedule, steps) / steps)
    assert shares[0] == pytest.approx(shares[1], rel=0.05)
    assert 0 < shares[0] < 1


def test_budgets_of_a_shape_share_their_warm_up():
    run = {"schedule": {"warmup": 200, "kind": "wsd"}}
    warmups: dict[tuple[str, str], set[float]] = {}
    for found in expanded(1e-6, run=merge(CLUSTER["run"], run)).runs:
        config = found.config
        warmups.setdefault((found.family, str(config.model.shape)), set()).add(config.schedule.warmup)
    assert all(len(steps) == 1 and min(steps) >= 1 for steps in warmups.values())


def test_rules_and_checks_speak_of_the_file():
    groups = {"dense": {"exclude": [{"model.shape": "125M", "training.flops": 1e19}]}}
    rule = {"check": {"at": {"model.shape": "350M", "training.flops": 1e18}, "factors": [2]}}
    found = expanded(1e-6, groups=merge(CLUSTER["groups"], groups), lr_rule={**CLUSTER["lr_rule"], **rule})
    assert len(found.runs) == 8
    (check,) = (run for run in found.runs if run.check)
    assert check.config.training.flops == 1e12
    assert check.family == "dense"


def test_one_changes_nothing():
    with_key, without = expanded(1.0), expand(validate(StudyConfig, CLUSTER, "study"))
    assert with_key == without
    assert without.runs[-1].config.parallel.tensor == 4


def test_a_shrunk_study_can_be_planned(tmp_path):
    (tmp_path / "study.yaml").write_text(
        "run:\n"
        "  data: {domains: {c: {source: stdlib}}, tokenizer: {vocab: 1024}, samples: 100_000_000}\n"
        "  training: {seq: 2048, batch: 256}\n"
        "  parallel: {tensor: 8}\n"
        "lr_rule: {base_lr: 6e-4, base_width: 768}\n"
        "groups:\n"
        "  dense: {family: dense, grid: {model.shape: [125M, 350M], training.flops: [3e18, 1e19]}}\n"
    )
    study = load_study(tmp_path / "study.yaml", ["scale=1e-7", "run.training.seq=128"])
    rows = plan_study(study, expand(study)).rows
    assert sorted({round(row.flops / 1e10) for row in rows}) == [30, 100]
    assert {row.layout["world"] for row in rows} == {1}


@pytest.mark.parametrize(
    ("scale", "change", "words"),
    [
        (1e-9, {}, ["scale (1e-09)", "125M and 350M would both become d16", "a scale of"]),
        (1e-6, {"run": {"model": {"width": 64}}}, ["model.width (64)", "model.shape instead"]),
        (1e-6, {"run": {"schedule": {"kind": "wsd", "warmup": 5, "branches": [7]}}}, ["schedule.branches"]),
        (
            1e-6,
            {"groups": {"moe": {"set": {"moe": {"active": 1, "experts": 2, "expert_width": 64}}}}},
            ["moe.expert_width (64)", "moe.granularity instead"],
        ),
        (
            1e-6,
            {"groups": {"wide": {"family": "w", "set": {"model.layers": 2, "model.width": 64, "model.heads": 2}}}},
            ["groups.wide", "model.layers (2)", "model.shape instead"],
        ),
        (2, {}, ["scale"]),
        (0, {}, ["scale"]),
    ],
)
def test_what_cannot_shrink_is_refused(scale, change, words):
    with pytest.raises(UserError) as error:
        expand(validate(StudyConfig, merge({**CLUSTER, "scale": scale}, change), "study"))
    for word in words:
        assert word in str(error.value)


def test_the_scale_that_is_offered_works():
    with pytest.raises(UserError) as error:
        expanded(1e-9)
    offered = float(str(error.value).split("a scale of ")[1].split(" ")[0])
    assert len(expanded(offered).runs) == 8
