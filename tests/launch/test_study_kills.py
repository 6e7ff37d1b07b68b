"""A study whose processes are killed at random moments leaves the records of one that nobody disturbed.

tests/launch/test_study_run.py kills two at chosen places, every time.
"""

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from moescale.scaling.record import read_record, same

STUDY = """
run: {{extends: {work}/base.yaml, checkpoint: {{every: 25}}}}
workers: 2
groups:
  dense: {{family: dense, grid: {{training.steps: {steps}}}}}
  moe:
    family: E4G2
    set:
      moe: {{experts: 4, active: 2, granularity: 2}}
      noise: {{every: 10, small_batch: 1}}
      training.steps: {last}
"""
Start = Callable[..., "subprocess.Popen[bytes]"]


def progress(folder: Path) -> int:
    """Steps that all runs have recorded."""
    return sum(read_record(path.parent).last_step for path in (folder / "runs").glob("*/record.jsonl"))


def go_on_until(steps: int, folder: Path, parent: "subprocess.Popen[bytes]") -> bool:
    """Wait until the study has recorded so many steps; False if it ended before."""
    deadline = time.monotonic() + 240
    while progress(folder) < steps:
        if parent.poll() is not None:
            return False
        assert time.monotonic() < deadline, f"{progress(folder)} of {steps} steps"
        time.sleep(0.02)
    return parent.poll() is None


def kill_one(parent: "subprocess.Popen[bytes]", who: str, draw: random.Random) -> bool:
    """SIGKILL the parent or one of its children; False if there was none."""
    if who == "parent":
        parent.kill()
        parent.wait()
        return True
    children = psutil.Process(parent.pid).children()
    if not children:
        return False
    os.kill(draw.choice(children).pid, signal.SIGKILL)
    return True


def disturb(study: Path, out: Path, total: int, kills: list[str], started: Start, draw: random.Random) -> None:
    """Start the study, kill one of its processes after a random number of further steps, and so on."""
    parent = started("study", "run", study, "--out", out)
    waiting = list(kills)
    while waiting:
        target = progress(out) + draw.randint(1, (total - progress(out)) // (len(waiting) + 1))
        if go_on_until(target, out, parent):
            time.sleep(draw.uniform(0, 0.03))
            if kill_one(parent, waiting[0], draw):
                waiting.pop(0)
        if parent.poll() is not None and waiting:
            parent = started("study", "run", study, "--out", out)
    parent.wait(240)


@pytest.mark.slow
@pytest.mark.distributed
def test_ten_kills(work, tmp_path, started):
    seed = random.randrange(10**6)
    print(f"seed {seed}")  # shown where the test fails
    draw = random.Random(seed)
    steps = [1500, 1000, 700, 900]
    study, out, undisturbed = tmp_path / "study.yaml", tmp_path / "disturbed", tmp_path / "undisturbed"
    study.write_text(STUDY.format(work=work, steps=steps[:-1], last=steps[-1]))
    reference = started("study", "run", study, "--out", undisturbed)
    disturb(study, out, sum(steps), [draw.choice(["parent", "child"]) for _ in range(10)], started, draw)
    assert started("study", "run", study, "--out", out).wait(240) == 0
    assert reference.wait(240) == 0
    names = sorted(path.name for path in (undisturbed / "runs").iterdir())
    assert names == sorted(path.name for path in (out / "runs").iterdir())
    assert len(names) == len(steps)
    for name in names:
        disturbed, alone = (read_record(path / "runs" / name, strict=True) for path in (out, undisturbed))
        assert same(disturbed, alone) == []
        assert [line["step"] for line in disturbed.steps] == list(range(1, disturbed.last_step + 1))
    starts = [len(read_record(out / "runs" / name).headers) for name in names]
    assert max(starts) > 1  # the kills did hit runs
