"""How Slurm tells what became of jobs that squeue has forgotten, with accounting and without; and a lack of memory."""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_cluster import INSTALL_ACCOUNTING, SlurmCluster, can_limit_memory, missing, until

from moescale.launch.slurm import commands
from moescale.launch.slurm.attempts import Attempts
from moescale.launch.slurm.traces import verdict_in_logs
from moescale.training.status import read_status

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
EAT = f"{sys.executable} -c 'held = bytearray(1 << 30)'"
SLEEP = "sleep 300"
# What is submitted, with which options, and the state in which it has to end.
JOBS = {
    "COMPLETED": ("true", ()),
    "FAILED": ("exit 3", ()),
    "OUT_OF_MEMORY": (EAT, ()),
    "TIMEOUT": (SLEEP, ("--time=1",)),
    "CANCELLED": (SLEEP, ()),
    "NODE_FAIL": (SLEEP, ("--no-requeue", "--nodelist=node4")),
}
# A job that Slurm does not end itself leaves nothing of Slurm's in its log, nor does one whose node is gone.
TOLD_BY_LOGS = ("OUT_OF_MEMORY", "TIMEOUT", "CANCELLED")


@pytest.fixture
def accounted() -> Iterator[SlurmCluster]:
    """Four nodes, with accounting and with limits on memory."""
    if absent := missing(accounting=True):
        pytest.skip(f"needs Slurm with accounting (no {', '.join(absent)}): {INSTALL_ACCOUNTING}")
    if not can_limit_memory():
        pytest.skip("needs root and memory cgroups of version 1")
    with tempfile.TemporaryDirectory(prefix="slurm") as folder:
        cluster = SlurmCluster(Path(folder), cores=2, accounting=True, limit_memory=True)
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()


def submit(slurm: SlurmCluster, study: Path, wrapped: str, *options: str) -> int:
    log = study / "slurm" / "001" / "runs-1-%A-%a.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    done = slurm.ask(
        "sbatch", "--parsable", "--array=0-0", f"--output={log}", "--mem=100M", *options, "--wrap", wrapped
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.timeout(600)
def test_states_of_jobs_that_are_forgotten(
    accounted: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, accounted.environment[name])
    jobs = {state: submit(accounted, tmp_path, what, *options) for state, (what, options) in JOBS.items()}
    until(lambda: jobs["CANCELLED"] in running() and jobs["NODE_FAIL"] in running(), "jobs that run", 60)
    assert accounted.ask("scancel", f"{jobs['CANCELLED']}_0").returncode == 0
    accounted.kill_node("node4")
    until(lambda: not accounted.queue(), "an empty queue", 240, tick=1)
    until(lambda: not commands.elements(), "that squeue forgets", 120, tick=1)

    expected = {(job, 0): state for state, job in jobs.items()}
    until(lambda: commands.ended(jobs.values()) == expected, f"{commands.ended(jobs.values())}", 60, tick=1)
    for state, job in jobs.items():
        assert verdict_in_logs(tmp_path, job, 0) == (state if state in TOLD_BY_LOGS else ""), state


def running() -> set[int]:
    return {element.job for element in commands.elements() if element.state == "RUNNING"}


@pytest.mark.timeout(600)
def test_a_lack_of_memory_is_tried_again_and_then_explained(accounted: SlurmCluster, tmp_path: Path) -> None:
    """srun ends with 1 then, as for any failure: what it says tells."""
    run = tmp_path / "runs" / "hungry"
    run.mkdir(parents=True)
    supervise = (
        f"exec {sys.executable} -m moescale.launch.slurm.supervise {run} --batch b "
        f"--restarts 5 --memory 1 --nonfinite 0 -- srun --quiet --mpi=none --mem=200M {EAT}"
    )
    submit(accounted, tmp_path, supervise, "--mem=1G", "--requeue")
    until(lambda: not accounted.queue(), f"an empty queue\n{accounted.queue()}", 240, tick=1)
    assert [end.outcome for _, end in Attempts(run).starts if end] == ["memory", "memory"]
    status = read_status(run)
    assert status is not None
    assert status.state == "failed"
    assert str(status.reason).startswith("out of memory: killed for exceeding what it was given; study resubmit asks")
    assert "2 times" in str(status.reason)
