"""What study plan says before anything starts."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from moescale import data
from moescale.base.config import validate
from moescale.base.errors import UserError
from moescale.launch.expansion import expand
from moescale.launch.plan import plan_study
from moescale.launch.plan_warnings import found_tokens, text_warnings
from moescale.launch.planned import Plan
from moescale.launch.study_config import StudyConfig, load_study

RUN: dict[str, Any] = {
    "data": {"domains": {"stdlib": {"source": "stdlib"}}},
    "training": {"seq": 32, "batch": 2, "tokens": 64 * 60},
    "model": {"shape": "d16"},
}
RULE = {"base_lr": 0.01, "base_width": 64}
MOE = {"moe": {"active": 2, "experts": 8, "granularity": 2}}


def plan(groups: dict[str, Any], **more: Any) -> Plan:
    content = {"name": "s", "run": RUN, "lr_rule": RULE, "workers": 1, "groups": groups, **more}
    study = validate(StudyConfig, content, "study")
    return plan_study(study, expand(study))


def test_impossible_runs_are_rows_with_a_reason(work, main, tmp_path):
    file = tmp_path / "study.yaml"
    file.write_text(
        f"run: {{extends: {work}/base.yaml}}\n"
        "groups:\n"
        "  a: {family: dense, grid: {training.tokens: [5, 3e4]}}\n"
        "  b: {family: heads, set: {training.steps: 60}, grid: {model.heads: [1, 3]}}\n"
        "  c: {family: E4, set: {training.steps: 60, moe: {experts: 4, active: 2}}, grid: {moe.granularity: [2, 3]}}\n"
    )
    result = main("study", "plan", file, "--json")
    assert result.returncode == 0, result.stderr
    planned = json.loads(result.stdout)
    reasons = {entry["name"]: entry["reason"] for entry in planned["impossible"]}
    assert sorted(reasons) == ["E4-d16-60steps-G3-s0", "dense-d16-5tok-s0", "heads-d16-60steps-model.heads3-s0"]
    assert "below one batch" in reasons["dense-d16-5tok-s0"]
    assert "moe.expert_width=24" in reasons["E4-d16-60steps-G3-s0"]
    assert {row["name"] for row in planned["runs"]} == {
        "E4-d16-60steps-G2-s0",
        "dense-d16-3e4tok-s0",
        "heads-d16-60steps-model.heads1-s0",
    }
    for name, reason in reasons.items():
        assert f"{name} is impossible and left out: {reason}" in planned["warnings"]

    shown = main("study", "plan", file)
    assert shown.returncode == 0
    assert "3 runs" in shown.stdout
    assert "3 impossible" in shown.stdout
    for name, reason in reasons.items():
        assert name in shown.stdout
        assert reason in shown.stderr


def test_where_nothing_is_possible_the_study_is_refused():
    with pytest.raises(UserError, match=r"groups\.a.*: a-d16-5tok-s0: training\.tokens \(5\) is below one batch"):
        plan({"a": {"family": "a", "set": {"training.tokens": 5}}, "b": {"family": "b", "set": {"training.seed": 1}}})
    with pytest.raises(UserError) as error:
        plan({"a": {"family": "a", "grid": {"training.tokens": [5, 6]}}})
    assert "a-d16-5tok-s0" in str(error.value)
    assert "a-d16-6tok-s0" in str(error.value)
    with pytest.raises(UserError, match=r"none of 2 runs can start: parallel\.tensor \(2\)"):
        plan({"a": {"family": "a", "set": {"parallel.tensor": 2}, "grid": {"training.seed": [0, 1]}}})


def test_few_steps_are_counted():
    said = plan({"a": {"family": "dense", "set": {"training.tokens": 512}}}).warnings
    assert [w for w in said if "1 run has fewer than 50 steps: dense-d16-512tok-s0 (8)" in w] == list(said)


def test_families_that_are_never_compared():
    dense = {"family": "dense", "grid": {"training.tokens": [4e3, 8e3]}}

    def said(tokens: float, family: str = "E8", first: dict[str, Any] = dense) -> list[str]:
        groups = {"one": first, "two": {"family": family, "set": {**MOE, "training.tokens": tokens}}}
        return [warning for warning in plan(groups).warnings if "compare" in warning]

    assert said(8e3) == []
    assert said(16e3) == [
        "family E8 has no budget that family dense has too, so the two are never compared; give them one"
    ]
    assert said(8e3, first={**dense, "family": "other"}) == [
        "no family is named dense, so the report compares E8, other with nothing"
    ]


def test_routing_that_couples_tokens():
    """Options of one axis, each warned of by itself; most of them need no warning."""
    routers = ["topk", "hash", "forced", "expert_choice", "sinkhorn"]
    group = {"family": "E8", "set": MOE, "grid": {"moe.router": routers}}
    said = [warning for warning in plan({"a": group}).warnings if "compare" not in warning]
    assert [warning.split(":")[0] for warning in said] == [
        "2 runs have moe.grouping=position, which couples the sequences of a micro-batch"
    ]
    assert "expert_choice" in said[0]
    assert "sinkhorn" in said[0]
    ahead = {**MOE["moe"], "grouping": "sequence", "allow_future_leak": True}
    group = {"family": "E8", "set": {"moe": ahead}, "grid": {"moe.router": ["expert_choice", "sinkhorn"]}}
    training, always = [warning for warning in plan({"a": group}).warnings if "future tokens" in warning]
    assert "1 run uses future tokens for routing in training; evaluation does not" in training
    assert "sinkhorn" in training
    assert "the loss is not a language model's" in always
    assert "expert_choice" in always


def test_one_learning_rate_for_several_widths():
    def said(**keys: Any) -> list[str]:
        groups = {"dense": {"family": "dense", **keys.pop("dense")}, "moe": {"family": "E8", "set": MOE, **keys}}
        run = {**RUN, "optimizer": {"lr": 0.01}}
        return [warning for warning in plan(groups, run=run, lr_rule=None).warnings if "artefact" in warning]

    shapes = {"grid": {"model.shape": ["d16", "d32"]}}
    (warning,) = said(dense=shapes)
    assert "optimizer.lr is 0.01 at all widths of the study (16, 32)" in warning
    swept = {"grid": {"model.shape": ["d16", "d32"], "optimizer.lr": [0.01, 0.02]}}
    assert said(dense=swept) == []
    assert "family E8" in said(dense=swept, **shapes)[0]
    together = {"grid": {"model.shape, optimizer.lr": [["d16", 0.01], ["d32", 0.02]]}}
    assert said(dense=together, **together) == []
    assert said(dense={}) == []
    assert not [w for w in plan({"dense": {"family": "dense", **shapes}}).warnings if "artefact" in w]


def test_repeated_text_is_known_once_the_data_is_prepared(work, main, tmp_path):
    file = tmp_path / "study.yaml"
    file.write_text(
        f"run: {{extends: {work}/base.yaml, data: {{path: {tmp_path}/cache}}}}\n"
        "groups: {a: {family: dense, grid: {training.steps: [60, 8000]}}}\n"
    )
    before = json.loads(main("study", "plan", file, "--json").stdout)["warnings"]
    assert sum("moescale data prepare" in warning for warning in before) == 1
    assert not (tmp_path / "cache").exists()
    study = load_study(file)
    runs = expand(study).runs
    prepared = data.prepare(runs[0].config.data)
    after = json.loads(main("study", "plan", file, "--json").stdout)["warnings"]
    times = 8000 * 32 / prepared.train_tokens
    assert times > 1
    assert after == [f"1 run sees training text more than once: dense-d16-8000steps-s0 ({times:.1f} times)"]
    assert found_tokens(runs) == {runs[0].config.data.model_dump_json(): prepared.train_tokens}
    few = {key: 10**9 for key in found_tokens(runs)}
    assert text_warnings(plan_study(study, expand(study)), runs, few) == []


def test_planning_many_runs_is_quick(tmp_path):
    grid = {
        "model.shape": ["d16", "d32", "d48", "d64", "d96"],
        "training.tokens": [float(n) * 1e4 for n in range(1, 11)],
        "training.seed": list(range(5)),
    }
    groups = {"dense": {"family": "dense", "grid": grid}, "moe": {"family": "E8", "set": MOE, "grid": grid}}
    began = time.process_time()
    assert len(plan(groups).rows) == 500
    assert time.process_time() - began < 3.0


def test_planning_does_not_wait_for_torch():
    script = (
        "import sys, moescale.launch.cli, moescale.launch.plan_table, moescale.launch.study_run\n"
        "sys.exit(', '.join({'torch', 'scipy', 'deepspeed', 'megatron'} & set(sys.modules)) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=Path("/"))
    assert result.returncode == 0, result.stderr
