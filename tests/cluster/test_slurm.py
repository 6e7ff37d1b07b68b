"""A study through a real Slurm: submitted, disturbed, reported."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from slurm_cluster import SlurmCluster, until

from moescale.base.files import read_lines
from moescale.scaling.record import RECORD, read_record, same
from moescale.training.status import read_status

LONG = "dense-d16-1200steps-s0"
WILD = "wild-d16-60steps-s0"
CLUSTER = {
    "node": {"cores": 1, "memory_gb": 15},
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

    def call(self, *arguments: object, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "moescale", "study", *map(str, arguments)]
        return subprocess.run(
            command, cwd=self.folder, env=self.slurm.environment, capture_output=True, text=True, timeout=timeout
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
        return [line for line in self._attempts(name) if line["kind"] == "start"]

    def ends(self, name: str) -> list[dict[str, Any]]:
        return [line for line in self._attempts(name) if line["kind"] == "end"]

    def _attempts(self, name: str) -> list[dict[str, Any]]:
        return read_lines(self.run(name) / "attempts.jsonl")

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


LONGEST = "dense-d16-16000steps-s0"
SPREAD = "spread-d16-300steps-s0"
MOE = {"moe.experts": 4, "moe.active": 2, "moe.granularity": 2}
TWELVE = {
    "dense": {"family": "dense", "grid": {"training.steps": [100, 3000, 4000, 9000, 16000]}},
    "moe": {"family": "moe", "set": MOE, "grid": {"training.steps": [100, 2000, 2500, 3000, 3500]}},
    "spread": {"family": "spread", "set": {**MOE, "parallel.expert": 2, "training.steps": 300}},
    "wild": {"family": "wild", "set": {"training.steps": 60, "optimizer.lr": 1e30, "optimizer.clip": 0}},
}
# The longest run needs several jobs.
SHORT_JOBS = {
    **CLUSTER,
    "max_nodes": 2,
    "time_limit_hours": 3 / 60,
    "lead_seconds": 60,
    "retry": {"restarts": 8, "nonfinite": 1},
}


class Trouble:
    """Disturbs runs of a study, each time another one that computes and will not be done at once."""

    def __init__(self, study: Study):
        self.study, self.slurm = study, study.slurm
        self.spared = {LONGEST, SPREAD, WILD}  # the longest run's trouble is the time limit
        self.hit: dict[str, str] = {}

    def victim(self, what: str, left: float = 8) -> dict[str, Any]:
        """A run that has taken steps and will compute for so many seconds more, on whatever machine; the longest."""
        found: list[dict[str, Any]] = []

        def look() -> bool:
            found[:] = [
                run for name, run in self.study.status().items()
                if name not in self.spared and run["state"] == "running" and self.seconds_left(run) > left
            ]  # fmt: skip
            return bool(found)

        until(look, f"a run for {what}\n{self.study.told()}", 400, tick=3)
        run = max(found, key=self.seconds_left)
        self.spared.add(run["name"])
        self.hit[what] = run["name"]
        return run

    def seconds_left(self, run: dict[str, Any]) -> float:
        """By its latest steps; 0 before there are any."""
        folder = self.study.run(run["name"])
        steps = read_record(folder).steps[-20:] if (folder / RECORD).exists() else []
        if len(steps) < 20:
            return 0
        return float(sum(step["seconds"] for step in steps) / 20 * (run["steps_total"] - steps[-1]["step"]))

    def preempt(self) -> None:
        node = self.victim("preemption")["nodes"]
        done = self.slurm.ask(
            "sbatch", "-p", "urgent", "--exclusive", "-w", node, "-o", "/dev/null", "--wrap", "sleep 1"
        )
        assert done.returncode == 0, done.stderr

    def requeue(self) -> None:
        job = self.victim("requeue")["job"]  # unless it waits just now, because its time was up
        until(lambda: self.slurm.ask("scontrol", "requeue", job).returncode == 0, "a job to requeue", 120, tick=1)

    def cancel(self) -> None:
        assert self.slurm.ask("scancel", self.victim("cancel")["job"]).returncode == 0

    def kill_rank(self) -> None:
        folder = str(self.study.run(self.victim("rank")["name"]))

        def kill() -> bool:
            ranks = [
                process for process in psutil.process_iter(["cmdline"])
                if (words := process.info["cmdline"] or [])[1:4] == ["-m", "moescale", "train"] and words[-1] == folder
            ]  # fmt: skip
            for rank in ranks:
                rank.kill()
            return bool(ranks)

        until(kill, "a rank to kill", 120)

    def kill_node(self) -> None:
        """Its jobs go on though Slurm gives it up and starts them elsewhere; then the node comes back.

        Slurm gives a silent node 10 s, and looks now and then: a run that is through by then was not hit.
        """
        while not self._is_hit_by_the_death_of_its_node(self.victim("node", left=35)):
            pass

    def _is_hit_by_the_death_of_its_node(self, run: dict[str, Any]) -> bool:
        self.slurm.kill_node(run["nodes"])
        until(lambda: self.slurm.state_of(run["nodes"]).startswith("down"), "a node that is down", 120, tick=0.5)
        status = read_status(self.study.run(run["name"]))
        self.slurm.start_node(run["nodes"])
        return status is not None and status.state != "done"


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(4500)
def test_twelve_runs_are_finished_or_explained(slurm: SlurmCluster, tmp_path: Path) -> None:
    study = Study(slurm, tmp_path, TWELVE, SHORT_JOBS)
    names = {script["name"]: script["runs"] for script in study.submit()["scripts"]}
    assert names["runs-1"] == [SPREAD]  # two nodes with a rank each, under torchrun
    trouble = Trouble(study)
    for strike in (trouble.kill_node, trouble.kill_rank, trouble.preempt, trouble.requeue, trouble.cancel):
        strike()
    study.until_all_is_over(2000)

    states = study.status()
    assert all(len(study.starts(name)) > 1 for what, name in trouble.hit.items() if what != "cancel"), trouble.hit
    cancelled = trouble.hit["cancel"]
    assert {name for name, state in states.items() if state["state"] != "done"} == {WILD, cancelled}, study.told()
    assert "cancelled" in states[cancelled]["reason"].lower()
    assert "not finite" in states[WILD]["reason"]
    assert len(study.starts(WILD)) == 2  # tried once more, in case a machine computed wrongly
    assert len(study.starts(LONGEST)) > 1
    assert any("time limit" in end["reason"] for end in study.ends(LONGEST))
    assert json.loads((study.out / "summary.json").read_text())["done"] == 10

    again = study.call("resubmit", study.out, "--json")
    assert again.returncode == 0, again.stderr
    assert sorted(json.loads(again.stdout)["scripts"][0]["runs"]) == sorted([cancelled, WILD])
    study.until_all_is_over(600)
    assert study.status()[cancelled]["state"] == "done", study.told()
    assert json.loads((study.out / "summary.json").read_text())["done"] == 11
    print({what: (name, len(study.starts(name))) for what, name in trouble.hit.items()})

    quiet = tmp_path / "undisturbed"
    groups = {name: group for name, group in TWELVE.items() if name in ("dense", "moe")}
    content = yaml.safe_load((tmp_path / "study.yaml").read_text())
    (tmp_path / "undisturbed.yaml").write_text(yaml.safe_dump({**content, "groups": groups}))
    done = study.call("run", "undisturbed.yaml", "--out", quiet, timeout=1800)
    assert done.returncode == 0, done.stderr
    for folder in sorted((quiet / "runs").iterdir()):
        assert is_exactly_once(study.run(folder.name))
        assert same(read_record(study.run(folder.name), strict=True), read_record(folder, strict=True)) == []
    assert is_exactly_once(study.run(SPREAD))
    assert read_record(study.run(SPREAD)).headers[0]["topology"]["nodes"] == 2
