"""What is submitted, and what is not: scripts stand for Slurm's commands, so that they can refuse and die at will.

tests/cluster/test_slurm.py does it with a real Slurm.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

STUDY = """
run: {{extends: {work}/base.yaml}}
groups:
  dense: {{family: dense, grid: {{training.steps: {steps}}}}}
"""
SMALL = [f"dense-d16-{count}steps-s0" for count in (3, 4, 5)]
CLUSTER = "node: {cores: 2, memory_gb: 4}\ntime_limit_hours: 1\n"
SBATCH = """#!/bin/bash
here=$(dirname "$0")
echo "$*" >> "$here/asked"
[[ $1 == --test-only ]] && list=refused || list=refused_late
if grep -qx "$(basename "${@: -1}")" "$here/$list" 2>/dev/null; then
    echo "sbatch: error: Invalid account" >&2
    exit 1
fi
[[ $1 == --test-only ]] || { echo $(($(wc -l < "$here/jobs" 2>/dev/null || echo 0) + 1)) | tee -a "$here/jobs"; }
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with ``sbatch`` and ``squeue``: what they are asked, refuse and answer lies beside them."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "queue").touch()
    for name, text in (("sbatch", SBATCH), ("squeue", f"#!/bin/sh\ncat {folder}/queue\n")):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder


@pytest.fixture
def submit(work: Path, tmp_path: Path, main: Callable[..., Any]) -> Callable[..., Any]:
    """Call ``study submit`` for runs of so many steps; their folder is ``out``."""

    def call(*options: str, steps: tuple[int, ...] = (60, 70), more: str = "") -> Any:
        study = tmp_path / "mine.yaml"
        study.write_text(STUDY.format(work=work, steps=list(steps)) + more)
        (tmp_path / "cluster.yaml").write_text(CLUSTER)
        there = ["--cluster", tmp_path / "cluster.yaml", "--out", tmp_path / "out"]
        return main("study", "submit", study, *there, "--json", *options)

    return call


def batches(result: Any) -> dict[str, list[str]]:
    assert result.returncode == 0, result.stderr
    return {script["name"]: script["runs"] for script in json.loads(result.stdout)["scripts"]}


def queued(job: int, index: int, state: str = "PENDING") -> str:
    return f"{job}|{index}|{state}|Priority||comment\n"


def test_a_dry_run_needs_no_slurm_and_leaves_nothing(submit, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    result = submit("--dry-run")
    assert batches(result)["runs-1"] == ["dense-d16-60steps-s0", "dense-d16-70steps-s0"]
    assert not (tmp_path / "out").exists()
    refused = submit()
    assert refused.returncode == 2
    assert "there is no Slurm on this machine" in refused.stderr
    assert not (tmp_path / "out").exists()


def test_only_what_is_new_is_submitted(submit, main, slurm, tmp_path):
    first = batches(submit())
    assert list(first)[-2:] == ["runs-1", "report"]
    job = len(first) - 1  # of runs-1: the last but one
    (slurm / "queue").write_text(queued(job, 0) + queued(job, 1, "RUNNING"))
    asked = (slurm / "asked").read_text()
    assert batches(submit()) == {}
    assert (slurm / "asked").read_text() == asked
    assert batches(submit(steps=(60, 70, 80)))["runs-1"] == ["dense-d16-80steps-s0"]

    (slurm / "queue").write_text(queued(job, 0, "CANCELLED") + queued(job, 1, "RUNNING"))
    again = main("study", "resubmit", tmp_path / "out", "--dry-run", "--json")
    lost = ["dense-d16-60steps-s0", "dense-d16-80steps-s0"]  # Slurm knows nothing of the last one's job
    assert batches(again)["runs-1"] == lost

    here = main("study", "run", tmp_path / "mine.yaml", "--out", tmp_path / "out")
    assert here.returncode == 2
    assert "dense-d16-70steps-s0 was submitted to Slurm and is running" in here.stderr


def test_what_slurm_would_refuse_is_found_before_anything_is_submitted(submit, slurm, tmp_path):
    (slurm / "refused").write_text("report.sbatch\n")
    result = submit()
    assert result.returncode == 2
    assert "Invalid account" in result.stderr
    assert not (slurm / "jobs").exists()
    assert not (tmp_path / "out" / "journal.jsonl").exists()


def test_what_slurm_refuses_half_way_is_submitted_next_time(submit, slurm, tmp_path):
    (slurm / "refused_late").write_text("runs-1.sbatch\n")
    result = submit()
    assert result.returncode == 2
    assert "Invalid account" in result.stderr
    (slurm / "refused_late").unlink()
    assert batches(submit())["runs-1"] == ["dense-d16-60steps-s0", "dense-d16-70steps-s0"]


def test_a_controller_that_is_down_stops_everything(submit, slurm, tmp_path):
    batches(submit())
    (slurm / "squeue").write_text("#!/bin/sh\necho 'Unable to contact slurm controller' >&2; exit 1\n")
    result = submit(steps=(60, 70, 80))
    assert result.returncode == 2
    assert "nothing was submitted" in result.stderr
    assert "Unable to contact slurm controller" in result.stderr


def test_a_run_that_does_not_fit_the_cluster_is_refused(submit, slurm, tmp_path):
    result = submit("run.runtime.threads=8")
    assert result.returncode == 2
    assert "runtime.threads (8) exceeds node.cores (2) of cluster cluster" in result.stderr
    assert not (slurm / "asked").exists()


@pytest.fixture
def predicted(submit, main, slurm, tmp_path):
    """Keywords of ``submit`` for a study whose largest run, of 6 steps, a law predicts."""
    submit("--dry-run", steps=(3, 4, 5, 6))
    plan = json.loads(main("study", "plan", tmp_path / "mine.yaml", "--json").stdout)["runs"]
    largest = max(row["flops"] for row in plan)
    fit = f"{{law: power, map: {{c: c}}, hold_out: 'c>={largest:.17g}', predict: true}}"
    return {"steps": (3, 4, 5, 6), "more": f"\nfit: [{fit}]\n"}


def test_runs_that_a_law_predicts_are_held_back(submit, predicted):
    result = submit(**predicted)
    assert batches(result)["runs-1"] == SMALL
    assert "1 runs that laws predict are held back (dense-d16-6steps-s0): 3 others come first" in result.stderr
    assert batches(submit(**predicted)) == {}


@pytest.mark.slow
def test_they_are_predicted_and_submitted_when_the_others_are_over(submit, predicted, main, tmp_path):
    out = tmp_path / "out"
    submit(**predicted)
    for name in SMALL:
        trained = main("train", out / "runs" / name / "config.yaml", "--out", out / "runs" / name)
        assert trained.returncode == 0, trained.stderr
    assert batches(submit("--dry-run", **predicted))["runs-1"] == ["dense-d16-6steps-s0"]
    assert not (out / "predictions.jsonl").exists()
    assert batches(submit(**predicted))["runs-1"] == ["dense-d16-6steps-s0"]
    [line] = (out / "predictions.jsonl").read_text().splitlines()
    assert json.loads(line)["run"] == "dense-d16-6steps-s0"
    assert not json.loads(line)["after"]
