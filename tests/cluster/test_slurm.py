"""A study through a real Slurm: submitted, disturbed, reported."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from slurm_cluster import SlurmCluster, until

from moescale.scaling.record import RECORD, read_record
from moescale.training.status import read_status

LONG = "dense-d16-1200steps-s0"
WILD = "wild-d16-60steps-s0"
CLUSTER = {
    "node": {"cores": 2, "memory_gb": 15},
    "time_limit_hours": 0.5,
    "lead_seconds": 30,
    "interface": "lo",
    "retry": {"nonfinite": 0},
}


class Study:
    """A study file, its folder, and the command line beside the cluster."""

    def __init__(self, slurm: SlurmCluster, folder: Path, groups: dict[str, Any], cluster: dict[str, Any]):
        self.slurm, self.folder = slurm, folder
        self.out = folder / "the study's folder $(x)"  # a name that a shell would take for something else
        corpus = folder / "corpus"
        corpus.mkdir()
        for name in ("argparse.py", "typing.py", "ast.py", "inspect.py"):
            text = (Path(os.__file__).parent / name).read_text(encoding="utf-8")
            (corpus / name).write_text(text, encoding="utf-8")
        run = {
            "data": {
                "path": "cache",  # relative to where the study is submitted
                "domains": {"python": {"files": ["corpus/*.py"]}},
                "tokenizer": {"vocab": 512},
                "held_out": 0.2,
            },
            "model": {"shape": "d16"},
            "training": {"seq": 16, "batch": 2},
            "optimizer": {"lr": 0.01},
            "eval": {"sequences": 4},
            "checkpoint": {"every": 100},
            "logging": {"tensorboard": False},
            "runtime": {"threads": 1, "timeout": 60},
        }
        (folder / "study.yaml").write_text(yaml.safe_dump({"run": run, "groups": groups, "name": "disturbed"}))
        (folder / "cluster.yaml").write_text(yaml.safe_dump(cluster))

    def call(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "moescale", "study", *map(str, arguments)]
        return subprocess.run(
            command, cwd=self.folder, env=self.slurm.environment, capture_output=True, text=True, timeout=240
        )

    def submit(self, *more: object) -> dict[str, Any]:
        done = self.call("submit", "study.yaml", "--cluster", "cluster.yaml", "--out", self.out, "--json", *more)
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout))

    def status(self) -> dict[str, dict[str, Any]]:
        done = self.call("status", self.out, "--json")
        assert done.returncode == 0, done.stderr
        return {run["name"]: run for run in json.loads(done.stdout)["runs"]}

    def run(self, name: str) -> Path:
        return self.out / "runs" / name

    def steps(self, name: str) -> int:
        return read_record(self.run(name)).last_step if (self.run(name) / RECORD).exists() else 0

    def starts(self, name: str) -> list[dict[str, Any]]:
        path = self.run(name) / "attempts.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [line for line in lines if line["kind"] == "start"]

    def told(self) -> str:
        """What every log of the study says, for a test that fails."""
        logs = [*self.out.glob("slurm/*/*.log"), *self.out.glob("runs/*/logs/*.log")]
        return "\n".join(f"== {path}\n{path.read_text(errors='replace')[-1500:]}" for path in sorted(logs))

    def until_all_is_over(self, seconds: float) -> None:
        try:
            until(lambda: not self.slurm.queue(), "an empty queue", seconds, tick=0.5)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.slurm.queue()}\n{self.told()}") from None


def is_exactly_once(folder: Path) -> bool:
    record = read_record(folder, strict=True)
    return [line["step"] for line in record.steps] == list(range(1, record.last_step + 1))


@pytest.mark.distributed
def test_a_preempted_study_reaches_its_report(slurm: SlurmCluster, tmp_path: Path) -> None:
    groups = {
        "dense": {"family": "dense", "grid": {"training.steps": [60, 1200]}},
        "wild": {"family": "wild", "set": {"training.steps": 60, "optimizer.lr": 1e30, "optimizer.clip": 0}},
    }
    study = Study(slurm, tmp_path, groups, CLUSTER)
    shown = study.submit("--dry-run")
    assert not study.out.exists()
    assert [script["name"] for script in shown["scripts"]] == ["prepare", "runs-1", "report"]

    jobs = {script["name"]: script["job"] for script in study.submit()["scripts"]}
    assert study.submit()["scripts"] == []  # everything is queued or runs

    until(lambda: study.steps(LONG) > 20, f"first steps\n{study.told()}", 120)
    node = study.status()[LONG]["nodes"]
    urgent = slurm.ask("sbatch", "-p", "urgent", "--exclusive", "-w", node, "-o", "/dev/null", "--wrap", "sleep 1")
    assert urgent.returncode == 0, urgent.stderr
    until(lambda: len(study.starts(LONG)) == 2, "a second start", 60)
    study.until_all_is_over(120)

    states = study.status()
    assert {name: state["state"] for name, state in states.items()} == {
        "dense-d16-60steps-s0": "done", LONG: "done", WILD: "failed",
    }, study.told()  # fmt: skip
    assert "not finite" in states[WILD]["reason"]
    assert len(study.starts(WILD)) == 1
    first, second = study.starts(LONG)
    assert first["job"] == second["job"] == states[LONG]["job"] == f"{jobs['runs-1']}_{first['job'].split('_')[1]}"
    assert first["saved"] == "" != second["saved"]
    assert is_exactly_once(study.run(LONG))
    assert [header["resumed_from"] for header in read_record(study.run(LONG)).headers] == [
        None, int(second["saved"].removeprefix("step-")),
    ]  # fmt: skip
    events = [line["why"] for line in read_record(study.run(LONG)).events if line["what"] == "preempted"]
    assert events == [f"Slurm sent SIGUSR1 to job {first['job']} (time limit or preemption)"]
    assert (study.out / "report.html").is_file(), study.told()
    assert json.loads((study.out / "summary.json").read_text())["done"] == 2

    again = study.call("resubmit", study.out, "--dry-run", "--json")
    scripts = json.loads(again.stdout)["scripts"]
    assert [script["runs"] for script in scripts] == [[WILD], []]
    status = read_status(study.run(WILD))
    assert status is not None
    assert status.state == "failed"  # a dry run changes nothing
