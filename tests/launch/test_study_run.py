"""A real study, killed and stopped, with a run that diverges, brought to its end by calling the same command again."""

import json
import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from moescale.scaling.record import read_record, same
from moescale.training.status import read_status

LONG_STEPS = 600
STUDY = """
run: {{extends: {work}/base.yaml}}
workers: 2
groups:
  long:
    family: dense
    set: {{training.steps: {long}, checkpoint.every: 50}}
  short:
    family: E4G2
    set: {{moe.experts: 4, moe.active: 2, moe.granularity: 2}}
    grid: {{training.steps: [3, 4, 5]}}
"""
DIVERGING = """
  diverging:
    family: wild
    set: {training.steps: 60, optimizer.lr: 1.0e+30, optimizer.clip: 0}
"""


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        time.sleep(0.02)


def is_alive(process: psutil.Process) -> bool:
    """Zombies are dead: not every container has an init that buries them."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def steps_of(folder: Path) -> int:
    return read_record(folder).last_step if (folder / "record.jsonl").exists() else 0


def who_writes(folder: Path, parent: int) -> psutil.Process | None:
    """The child of ``parent`` that works in a run's folder."""
    for child in psutil.Process(parent).children():
        with suppress(psutil.NoSuchProcess):
            if any(file.path.startswith(f"{folder}{os.sep}") for file in child.open_files()):
                return child
    return None


@pytest.mark.distributed
def test_interrupted_study_reaches_its_end(work, moescale, started):
    study, out = work / "interrupted.yaml", work / "interrupted"
    sound = STUDY.format(work=work, long=LONG_STEPS)
    study.write_text(sound + DIVERGING)
    long = out / "runs" / f"dense-d16-{LONG_STEPS}steps-s0"
    command = ("study", "run", study, "--out", out)

    # Nobody disturbs this one.
    (work / "undisturbed.yaml").write_text(sound)
    undisturbed = started("study", "run", work / "undisturbed.yaml", "--out", work / "undisturbed")

    # SIGKILL of the parent takes the children along.
    parent = started(*command)
    wait_for(lambda: steps_of(long) > random.randint(60, 140), "first steps")
    children = psutil.Process(parent.pid).children()
    assert children
    parent.send_signal(signal.SIGKILL)
    wait_for(lambda: not any(map(is_alive, children)), "death of the children", seconds=3)
    reached = steps_of(long)
    assert reached < LONG_STEPS

    # SIGTERM asks the children to save and stop.
    parent = started(*command)
    wait_for(lambda: (found := read_status(long)) is not None and found.attempt == 2, "second attempt")
    wait_for(lambda: steps_of(long) > 150, "more steps")
    parent.send_signal(signal.SIGTERM)
    assert parent.wait(60) == 75
    status = read_status(long)
    assert status is not None
    assert status.state == "preempted"
    assert 150 < status.step < LONG_STEPS

    # The rest finishes though one run diverges and another is killed.
    parent = started(*command)
    wait_for(lambda: steps_of(long) > status.step + random.randint(1, 60), "steps of the third attempt")
    victim = who_writes(long, parent.pid)
    assert victim is not None
    victim.kill()
    assert parent.wait(120) == 1
    summary = json.loads((out / "summary.json").read_text())
    assert summary["done"] == 3
    reasons = {failure["run"]: failure["reason"] for failure in summary["failed"]}
    assert sorted(reasons) == [long.name, "wild-d16-60steps-s0"]
    assert "killed by SIGKILL" in reasons[long.name]
    assert "not finite" in reasons["wild-d16-60steps-s0"]
    assert (out / "points.csv").read_text().count("\n") == 6
    assert (out / "report.html").is_file()
    log = next((out / "runs" / "E4G2-d16-3steps-s0" / "logs").glob("*.log"))
    assert log.is_file()

    # Without the diverging run the next start finishes the study, and then there is nothing to do at all.
    study.write_text(sound)
    assert moescale(*command).returncode == 0
    before = (out / "report.html").stat().st_mtime_ns
    began = time.monotonic()
    result = moescale(*command)
    assert result.returncode == 0
    assert "4 runs done" in result.stdout
    assert time.monotonic() - began < 15
    assert (out / "report.html").stat().st_mtime_ns == before
    assert sorted(path.name for path in (long / "logs").glob("*.log")) == [f"{n}.log" for n in (1, 2, 3, 4)]
    assert undisturbed.wait(120) == 0
    for folder in (work / "undisturbed" / "runs").iterdir():
        assert same(read_record(out / "runs" / folder.name, strict=True), read_record(folder, strict=True)) == []

    # The folder does not take another configuration for these runs.
    result = moescale(*command, "run.optimizer.lr=0.02")
    assert result.returncode == 2
    assert f"dense-d16-{LONG_STEPS}steps-s0" in result.stderr
    assert "another configuration" in result.stderr

    listed = json.loads(moescale("study", "status", out, "--json").stdout)["runs"]
    assert {run["state"] for run in listed} == {"done"}


def test_impossible_run_is_refused_before_anything_starts(work, main):
    study, out = work / "impossible.yaml", work / "impossible"
    broken = "  broken: {family: broken, set: {training.tokens: 5}}\n"
    study.write_text(STUDY.format(work=work, long=3) + broken)
    result = main("study", "run", study, "--out", out)
    assert result.returncode == 2
    assert "broken-d16-5tok-s0: training.tokens (5) is below one batch" in result.stderr
    assert "Traceback" not in result.stderr
    assert not out.exists()
