"""A run's state: what it says itself, joined with what Slurm says of its job."""

import fcntl
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from moescale.launch.planned import PlannedRun
from moescale.launch.slurm.attempts import Attempts
from moescale.launch.slurm.commands import Element
from moescale.launch.slurm.journal import Owner
from moescale.launch.slurm.states import NO_SLURM, Slurm, run_state
from moescale.training.status import LOCK, SILENCE, write_status

RUN = PlannedRun("a", "f", (), cast(Any, None))
OWNER = Owner(7, 2, 2048)
ELEMENT = Element(7, 2, "RUNNING", "None", "n3", "t")


def slurm(state: str, reason: str = "None") -> Slurm:
    return Slurm({(7, 2): replace(ELEMENT, state=state, reason=reason)}, {})


@pytest.mark.parametrize(
    ("said", "known", "state", "reason"),
    [
        ("pending", slurm("PENDING", "Priority"), "waiting", "waits: Priority"),
        ("pending", slurm("RUNNING"), "running", ""),
        ("running", slurm("RUNNING"), "running", ""),
        ("preempted", slurm("PENDING", "BeginTime"), "preempted", "said so"),
        ("failed", slurm("RUNNING"), "running", ""),  # it was started again and has not said so yet
        ("failed", slurm("FAILED"), "failed", "said so"),
        ("done", slurm("RUNNING"), "done", "said so"),
        ("pending", slurm("CANCELLED"), "lost", "its job 7_2 is over: CANCELLED; said so"),
        ("preempted", Slurm({}, {(7, 2): "NODE_FAIL"}), "lost", "its job 7_2 is over: NODE_FAIL; said so"),
        ("preempted", Slurm({}, {}), "lost", "its job 7_2 is over: Slurm has forgotten it; said so"),
        ("preempted", NO_SLURM, "preempted", "said so"),
        (None, slurm("PENDING"), "waiting", ""),
        (None, NO_SLURM, "pending", ""),
    ],
)
def test_states_are_joined(said: Any, known: Slurm, state: str, reason: str, tmp_path: Path) -> None:
    if said is not None:
        write_status(tmp_path, said, reason="said so", step=3, steps_total=9)
    found = run_state(RUN, tmp_path, OWNER, known)
    assert (found.state, found.reason, found.job) == (state, reason, "7_2")
    assert found.to_resubmit == (state in ("failed", "lost"))
    assert not found.to_submit


def test_what_a_job_left_tells_where_accounting_does_not(tmp_path: Path) -> None:
    """The lines are those of Slurm 22.05's slurmstepd; tests/cluster/test_accounting.py has it write them."""
    folder, log = tmp_path / "runs" / "a", tmp_path / "slurm" / "001" / "runs-1-7-2.log"
    log.parent.mkdir(parents=True)
    write_status(folder, "running", step=3, steps_total=9)
    Attempts(folder).start("b", "7_2", "n3", "")
    earlier = "slurmstepd: error: *** JOB 9 ON n3 CANCELLED AT 2026-11-22T20:00:00 DUE TO NODE FAILURE ***\n"
    began = "2026-11-22 20:01:00 start 1 of a as job 7_2; its output: 1.log\n"
    for text, verdict in (
        (earlier + began, "Slurm has forgotten it"),
        (began + "slurmstepd: error: *** JOB 9 ON n3 CANCELLED AT 2026 DUE TO TIME LIMIT ***\n", "TIMEOUT"),
        (began + "slurmstepd: error: *** JOB 9 ON n3 CANCELLED AT 2026 ***\n", "CANCELLED"),
        (earlier, "NODE_FAIL"),
    ):
        log.write_text(text)
        found = run_state(RUN, folder, OWNER, Slurm({}, {}))
        assert (found.state, found.step) == ("lost", 3)
        said = f"its job 7_2 is over: {verdict}; start 1 on n3 left no end: killed, or lost with its node"
        assert found.reason == said


def test_without_a_job_the_run_alone_says_how_it_is(tmp_path: Path) -> None:
    assert run_state(RUN, tmp_path, None, NO_SLURM).to_submit
    write_status(tmp_path, "failed", reason="it diverged")
    (tmp_path / "logs").mkdir()
    for attempt in (2, 10):
        (tmp_path / "logs" / f"{attempt}.log").write_text("\n".join(f"line {n} of {attempt}" for n in range(9)))
    found = run_state(RUN, tmp_path, None, NO_SLURM)
    assert (found.state, found.reason, found.to_submit, found.to_resubmit) == ("failed", "it diverged", True, True)
    assert found.log_tail == tuple(f"line {n} of 10" for n in range(4, 9))


@pytest.mark.parametrize(("silent", "state"), [(SILENCE + 60, "failed"), (60, "running")])
def test_a_run_elsewhere_that_fell_silent_is_over(silent: float, state: str, tmp_path: Path) -> None:
    """Its host may be gone, or its processes killed; locks of some file systems do not reach other hosts."""
    write_status(tmp_path, "running", step=3, steps_total=9)
    said = json.loads((tmp_path / "status.json").read_text())
    (tmp_path / "status.json").write_text(json.dumps({**said, "host": "elsewhere", "updated": time.time() - silent}))
    found = run_state(RUN, tmp_path, None, NO_SLURM)
    assert found.state == state
    assert state == "running" or "last on elsewhere; start it again to go on" in found.reason
    # A process that still holds the folder runs, whatever it says.
    with (tmp_path / LOCK).open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert run_state(RUN, tmp_path, None, NO_SLURM).state == "running"
