"""A study of 2,000 runs: what plan, status and collect take, as processes of their own.

``pytest -m slow tests/launch/test_many_runs.py -s`` prints the figures of docs/studies.md.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from made_records import write_records

from moescale.launch.expansion import expand
from moescale.launch.study_config import load_study
from moescale.launch.study_folder import StudyFolder
from moescale.scaling.condensed import CONDENSED

RUNS = 2000
STEPS = 300
GRID = {
    "model.shape": ["d32", "d48", "d64", "d96", "d128"],
    "training.flops": [float(f"{2**n}e11") for n in range(10)],
    "training.seed": list(range(20)),
}
STUDY = {
    "run": {
        "extends": "data/stdlib.yaml",
        "data": {"samples": 4_000_000},
        "training": {"seq": 128, "batch": 4},
        "noise": {"every": 20, "small_batch": 2},
    },
    "lr_rule": {"base_lr": 0.01, "base_width": 64},
    "groups": {
        "dense": {"family": "dense", "grid": GRID},
        "moe": {"family": "E8G4", "set": {"moe": {"granularity": 4, "active": 4, "experts": 32}}, "grid": GRID},
    },
}
# Several times what an idle machine takes: others may be at work here.
SECONDS = 20
READING_SECONDS = 40
MEMORY = 500e6


class Taken(NamedTuple):
    """What a command took: seconds of processor time, and bytes at most."""

    seconds: float
    memory: float
    answer: Any


# A process of Linux starts with the memory of the one that made it as its own maximum: a small one has to.
MEASURE = """
import json, resource, subprocess, sys
done = subprocess.run(sys.argv[2:])
used = resource.getrusage(resource.RUSAGE_CHILDREN)
with open(sys.argv[1], "w") as file:
    json.dump([used.ru_utime + used.ru_stime, used.ru_maxrss * 1024], file)
sys.exit(done.returncode)
"""


@pytest.fixture
def taken(environment: dict[str, str], tmp_path: Path) -> Callable[..., Taken]:
    def call(*arguments: object) -> Taken:
        command = [sys.executable, "-m", "moescale", *(str(argument) for argument in arguments), "--json"]
        measured = tmp_path / "measured.json"
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, str(measured), *command], capture_output=True, env=environment
        )
        assert done.returncode == 0, done.stderr
        found = Taken(*json.loads(measured.read_text()), json.loads(done.stdout))
        print(f"{arguments[1]}: {found.seconds:.1f} s of processor time, {found.memory / 1e6:.0f} MB")
        return found

    return call


@pytest.mark.slow
def test_two_thousand_runs(taken, tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(STUDY, sort_keys=False))
    plan = taken("study", "plan", file)
    assert len(plan.answer["runs"]) == RUNS

    study = load_study(file)
    expansion = expand(study)
    folder = StudyFolder(tmp_path / "out")
    folder.claim(study, expansion)
    write_records(folder, expansion.runs, STEPS)
    size = sum(path.stat().st_size for path in folder.path.rglob("record.jsonl"))
    print(f"records: {size / 1e6:.0f} MB")

    status = taken("study", "status", folder.path)
    collect = taken("study", "collect", folder.path)
    for path in folder.path.rglob(CONDENSED):
        path.unlink()
    reading = taken("study", "collect", folder.path)  # as where runs were killed, or copied, or other code made them
    assert len(status.answer["runs"]) == collect.answer["done"] == RUNS
    assert reading.answer == collect.answer
    assert reading.seconds < READING_SECONDS
    for what in (plan, status, collect):
        assert what.seconds < SECONDS
    for what in (plan, status, collect, reading):
        assert what.memory < MEMORY
