"""One start of a run, seen through: real processes stand for srun, and a script for scontrol."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moescale.training.status import read_status, write_status

Supervise = Callable[..., "subprocess.Popen[bytes]"]
# A run: says that it runs, waits for a stop file, obeys it.
OBEDIENT = """
import os, sys, time
from pathlib import Path
from moescale.training.status import write_status
folder = Path(sys.argv[1])
write_status(folder, "running", step=1, steps_total=9, attempt=1)
while not (folder / "stop").exists():
    time.sleep(0.02)
why = (folder / "stop").read_text().strip()
(folder / "checkpoints" / "step-00000005").mkdir(parents=True)
(folder / "stop").unlink()
write_status(folder, "preempted", reason=why or "a file named stop", step=5, steps_total=9, attempt=1)
sys.exit(75)
"""
TORCHRUN = """
  rank      : 0 (local_rank: 0)
  exitcode  : {} (pid: 17)
  rank      : 1 (local_rank: 1)
  exitcode  : -15 (pid: 18)
"""


@pytest.fixture
def calls(tmp_path: Path) -> Path:
    """What scontrol was asked; ``state`` beside it is what it answers."""
    return tmp_path / "calls"


@pytest.fixture
def supervise(tmp_path: Path, calls: Path) -> Supervise:
    program = tmp_path / "bin" / "scontrol"
    program.parent.mkdir()
    (tmp_path / "state").write_text("JobState=RUNNING Restarts=0")
    program.write_text(f'#!/bin/sh\necho "$@" >> {calls}\ncat {tmp_path}/state\n')
    program.chmod(0o755)
    environment = {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}"}
    environment |= {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}

    def start(*command: str, restarts: int = 2, nonfinite: int = 0, batch: str = "b") -> "subprocess.Popen[bytes]":
        policy = ["--restarts", str(restarts), "--memory", "1", "--nonfinite", str(nonfinite)]
        module = [sys.executable, "-m", "moescale.launch.slurm.supervise", str(tmp_path / "run"), "--batch", batch]
        return subprocess.Popen([*module, *policy, "--", *command], env=environment)

    return start


def obedient(folder: Path) -> list[str]:
    return [sys.executable, "-c", OBEDIENT, str(folder)]


def wait_until_it_runs(folder: Path) -> None:
    deadline = time.monotonic() + 60
    while (status := read_status(folder)) is None or status.state != "running":
        assert time.monotonic() < deadline
        time.sleep(0.02)


def ends(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "attempts.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "end"]


def test_a_warning_becomes_a_stop_file_and_a_requeue(tmp_path: Path, supervise: Supervise, calls: Path) -> None:
    folder = tmp_path / "run"
    process = supervise(*obedient(folder))
    wait_until_it_runs(folder)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(30) == 75
    assert calls.read_text().splitlines()[-1] == "requeue 7_3"
    end = ends(folder)[0]
    assert (end["outcome"], end["saved"]) == ("stopped", "step-00000005")
    assert end["reason"] == "Slurm sent SIGUSR1 to job 7_3 (time limit or preemption)"
    assert not (folder / "stop").exists()
    status = read_status(folder)
    assert status is not None
    assert (status.state, status.step) == ("preempted", 5)


@pytest.mark.parametrize(
    ("answer", "state", "code"),
    [("JobState=COMPLETING Restarts=0", "failed", 1), ("JobState=COMPLETING Restarts=1", "preempted", 75)],
)
def test_a_cancelled_job_is_told_from_a_requeued_one(
    answer: str, state: str, code: int, tmp_path: Path, supervise: Supervise, calls: Path
) -> None:
    folder = tmp_path / "run"
    process = supervise(*obedient(folder))
    wait_until_it_runs(folder)
    (tmp_path / "state").write_text(answer)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == code
    assert "requeue" not in calls.read_text()  # the one is not to start again, the other does by itself
    status = read_status(folder)
    assert status is not None
    assert status.state == state


def test_a_stop_file_of_a_person_is_obeyed_for_good(tmp_path: Path, supervise: Supervise, calls: Path) -> None:
    folder = tmp_path / "run"
    process = supervise(*obedient(folder))
    wait_until_it_runs(folder)
    (folder / "stop").touch()
    assert process.wait(30) == 1
    assert "requeue" not in calls.read_text()
    assert ends(folder)[0]["outcome"] == "cancelled"


@pytest.mark.parametrize(
    ("shell", "outcome", "again"),
    [
        ("exit 137", "crash", True),
        ("echo 'error: data.path: no such corpus'; echo 'srun: error: exited' >&2; exit 2", "input", False),
        (f"echo 'error: moe.experts: wrong'; echo '{TORCHRUN.format(2)}'; exit 1", "input", False),
        (f"echo 'RuntimeError: gone'; echo '{TORCHRUN.format(1)}'; exit 1", "crash", True),
    ],
)
def test_failures_are_told_apart(
    shell: str, outcome: str, again: bool, tmp_path: Path, supervise: Supervise, calls: Path
) -> None:
    assert supervise("bash", "-c", shell).wait(30) == (75 if again else 1)
    end = ends(tmp_path / "run")[0]
    assert end["outcome"] == outcome
    assert ("requeue 7_3" in calls.read_text()) == again
    if outcome == "input":
        assert "no such corpus" in end["reason"] or "moe.experts: wrong" in end["reason"]


def test_a_run_that_never_gets_anywhere_is_given_up(tmp_path: Path, supervise: Supervise, calls: Path) -> None:
    assert [supervise("false", restarts=1).wait(30) for _ in range(3)] == [75, 1, 1]
    status = read_status(tmp_path / "run")
    assert status is not None
    assert status.state == "failed"
    assert "2 starts in a row saved nothing at all: no use in another" in str(status.reason)
    assert len(ends(tmp_path / "run")) == 2  # the third call started nothing
    assert supervise("false", restarts=1, batch="resubmitted").wait(30) == 75


def test_an_earlier_start_that_still_lives_is_asked_to_hand_over(
    tmp_path: Path, supervise: Supervise, calls: Path
) -> None:
    """Slurm believes its node dead; the second start waits until the first has saved and let go."""
    folder = tmp_path / "run"
    locked = f"import fcntl; held = open({str(folder / '.lock')!r}, 'w'); fcntl.flock(held, fcntl.LOCK_EX)"
    first = supervise(sys.executable, "-c", locked + OBEDIENT, str(folder))
    wait_until_it_runs(folder)
    second = supervise("bash", "-c", f"test -d {folder}/checkpoints/step-00000005 && exit 0; exit 3")
    assert first.wait(30) == 75
    assert second.wait(30) == 75  # its command left no word of being done
    assert [line["outcome"] for line in ends(folder)] == ["crash"]
    assert "exit code 0" in ends(folder)[0]["reason"]


def test_a_finished_run_is_left_alone(tmp_path: Path, supervise: Supervise) -> None:
    write_status(tmp_path / "run", "done", step=9, steps_total=9)
    assert supervise("false").wait(30) == 0
    assert not (tmp_path / "run" / "attempts.jsonl").exists()


@pytest.mark.parametrize(
    ("reason", "code"), [("signal SIGTERM", 75), ("another rank was asked to", 75), ("a file named stop", 1)]
)
def test_ranks_that_were_signalled_go_on_later(
    reason: str, code: int, tmp_path: Path, supervise: Supervise, calls: Path
) -> None:
    """Slurm may signal the ranks and not the batch shell."""
    say = "import sys; from pathlib import Path; from moescale.training.status import write_status;"
    say += "write_status(Path(sys.argv[1]), 'preempted', reason=sys.argv[2])"
    assert supervise(sys.executable, "-c", say, str(tmp_path / "run"), reason).wait(30) == code
    assert ("requeue" in calls.read_text()) == (code == 75)
