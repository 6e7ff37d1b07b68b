"""Runs that the kernel kills for want of memory, told from those that somebody else killed."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from memory_limit import memory_limit, unable

from moescale.launch.failure import explain_failure, is_memory
from moescale.training.status import write_status

# The embedding of the large run alone takes 4 GiB and a plan's check of this machine's memory lets it pass.
LIMIT = 3 << 30
STUDY = """
run: {{extends: {work}/base.yaml}}
workers: 1
groups:
  memory:
    family: large
    set: {{training.steps: 3}}
    grid: {{model.vocab_multiple: [512, 67_108_864]}}
"""
LOST = "rank 1 on n2: ended without a word (killed, crashed, or the host out of memory)"


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.skipif(bool(unable()), reason=unable())
def test_the_kernel_ends_one_run_and_not_the_study(work: Path, moescale: Any) -> None:
    file, out = work / "memory.yaml", work / "memory"
    file.write_text(STUDY.format(work=work))
    with memory_limit(LIMIT) as limited:
        done = moescale("study", "run", file, "--out", out, "--json", preexec_fn=limited)
    assert done.returncode == 1, done.stderr
    summary = json.loads(done.stdout)
    assert summary["done"] == 1
    (failure,) = summary["failed"]
    assert failure["reason"] == (
        "out of memory: killed for exceeding what it was given; lower workers, training.micro_batch or the size of the "
        "model"
    )


@pytest.mark.parametrize(
    ("said", "code", "starved", "log", "memory"),
    [
        (None, -signal.SIGKILL, True, "", True),
        (None, -signal.SIGKILL, False, "", False),
        (None, -signal.SIGKILL, None, "", False),
        (None, -signal.SIGTERM, True, "", False),  # another process of this machine was killed meanwhile
        (LOST, 1, True, "", True),
        (LOST, 1, False, "", False),
        (None, 1, None, "srun: error: node1: task 0: Out Of Memory\n", True),
        (None, 1, None, "slurmstepd-n1: error: Detected 1 oom-kill event(s) in StepId=1.0. Some of", True),
        ("loss or gradient is not finite at step 3", 1, None, "", False),
    ],
)
def test_a_kill_for_memory_is_told_from_others(
    said: str | None, code: int, starved: bool | None, log: str, memory: bool, tmp_path: Path
) -> None:
    if said is not None:
        write_status(tmp_path, "failed", reason=said)
    (tmp_path / "1.log").write_text(log)
    reason = explain_failure(tmp_path, tmp_path / "1.log", 0.0, code, starved=starved)
    assert is_memory(reason) == memory, reason
