"""Budgets that share a trunk: what is planned, and that the branches come out as runs of their own would."""

import pytest
import yaml

from moescale.base.errors import UserError
from moescale.launch.expansion import expand
from moescale.launch.plan import plan_study
from moescale.launch.study_config import load_study
from moescale.scaling.record import read_record

SCHEDULE = {"kind": "wsd", "warmup": 2, "decay": 0.25}


def write(folder, name, *, branch, budgets, schedule=SCHEDULE, sizes=("d16",)):
    content = {
        "run": {"extends": str(folder / "base.yaml"), "schedule": schedule},
        "groups": {
            "dense": {
                "family": "dense",
                "grid": {"training.steps": list(budgets), "model.shape": list(sizes)},
                "branch": branch,
            }
        },
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def planned(path):
    study = load_study(path)
    expansion = expand(study)
    return {run.name: run for run in expansion.runs}, plan_study(study, expansion)


def test_the_longest_run_of_each_size_is_the_trunk(work):
    runs, plan = planned(write(work, "trunks", branch=True, budgets=(8, 16, 40), sizes=("d16", "d32")))
    assert len(runs) == 6
    for size in ("d16", "d32"):
        trunk, middle, short = (runs[f"dense-{size}-{steps}steps-s0"] for steps in (40, 16, 8))
        assert (trunk.trunk, middle.trunk, short.trunk) == ("", trunk.name, trunk.name)
        assert trunk.config.schedule.branches == (8, 16)
        assert short.config.schedule.parent.model_dump() == {"run": f"../{trunk.name}", "step": 6}
        assert middle.config.schedule.parent.step == 12
    rows = {row.name: row for row in plan.rows}
    assert (rows["dense-d16-16steps-s0"].steps, rows["dense-d16-16steps-s0"].own_steps) == (16, 4)
    assert plan.as_json()["totals"]["tokens"] == 2 * (40 + 4 + 2) * 32


def test_a_budget_too_short_to_branch_is_impossible_alone(work):
    runs, plan = planned(write(work, "short", branch=True, budgets=(2, 8, 40)))
    assert [run.name for run in plan.impossible] == ["dense-d16-2steps-s0"]
    assert runs["dense-d16-40steps-s0"].config.schedule.branches == (8,)
    assert runs["dense-d16-8steps-s0"].trunk == "dense-d16-40steps-s0"


def test_without_branch_every_run_stands_alone(work):
    runs, plan = planned(write(work, "alone", branch=False, budgets=(8, 16)))
    assert all(run.trunk == "" and run.config.schedule.parent is None for run in runs.values())
    assert all(row.own_steps == row.steps for row in plan.rows)


def test_a_schedule_that_cannot_branch_is_refused(work):
    for schedule in ({"kind": "cosine", "warmup": 2}, {**SCHEDULE, "warmup": 0.1}):
        path = write(work, "refused", branch=True, budgets=(8, 16), schedule=schedule)
        with pytest.raises(UserError, match=r"groups\.dense\.branch: .*schedule"):
            expand(load_study(path))


def test_branches_equal_runs_of_their_own(work, moescale):
    out = work / "branched"
    done = moescale("study", "run", write(work, "branched", branch=True, budgets=(8, 12, 24)), "--out", out)
    assert done.returncode == 0, done.stderr
    alone = moescale("study", "run", write(work, "whole", branch=False, budgets=(8, 12)), "--out", work / "whole")
    assert alone.returncode == 0, alone.stderr
    for name, first in (("dense-d16-8steps-s0", 7), ("dense-d16-12steps-s0", 10)):
        branch, whole = read_record(out / "runs" / name), read_record(work / "whole" / "runs" / name)
        assert [line["step"] for line in branch.steps] == list(range(first, whole.last_step + 1))
        mine = [(line["step"], line["loss"], line["lr"]) for line in branch.steps]
        assert mine == [(line["step"], line["loss"], line["lr"]) for line in whole.steps[first - 1 :]]
        assert branch.evals[-1]["loss"] == whole.evals[-1]["loss"]
    assert moescale("study", "run", work / "branched.yaml", "--out", out).returncode == 0  # nothing left to do
