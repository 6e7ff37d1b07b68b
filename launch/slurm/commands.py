"""Slurm's commands, as they are: the only file that calls them."""

import os
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ...base.errors import UserError

INSTALL = "apt-get install slurm-wlm, or the cluster's own client package"
_PATIENCE = 60  # seconds for a controller that is busy
# Jobs in these states do not come back by themselves.
_OVER = frozenset(
    [
        "BOOT_FAIL",
        "CANCELLED",
        "COMPLETED",
        "DEADLINE",
        "FAILED",
        "NODE_FAIL",
        "OUT_OF_MEMORY",
        "PREEMPTED",
        "REVOKED",
        "TIMEOUT",
    ]
)
_ENDING = ("CANCELLED", "COMPLETING", "TIMEOUT")
Fate = Literal["goes on", "restarts", "ends"]
_FIELDS = "%F|%K|%T|%r|%N|%k"  # array's job id, element, state, why it waits, nodes, comment


@dataclass(frozen=True)
class Element:
    """An element of an array as Slurm knows it."""

    job: int
    index: int
    state: str
    reason: str
    nodes: str
    comment: str

    @property
    def over(self) -> bool:
        return self.state in _OVER

    @property
    def waits(self) -> bool:
        return self.state in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT")


def is_installed() -> bool:
    """Whether this machine has Slurm's commands."""
    return shutil.which("squeue") is not None


def require_slurm() -> None:
    """Raises a `UserError` where Slurm's commands are missing."""
    if not is_installed():
        raise UserError(
            f"there is no Slurm on this machine (no squeue): {INSTALL}. --dry-run shows the scripts without it, and "
            "study run does the study here"
        )


def elements() -> list[Element]:
    """The user's jobs that wait, run, or ended within the time that Slurm remembers (MinJobAge).

    Raises:
        UserError: Slurm does not answer.
    """
    said = _call(["squeue", "--me", "--noheader", "--array", "--states=all", f"--format={_FIELDS}"])
    found = []
    for line in said.splitlines():
        job, index, state, reason, nodes, comment = line.split("|", 5)
        found.append(Element(int(job), int(index) if index.isdigit() else 0, state, reason, nodes, comment))
    return found


def ended(jobs: Iterable[int]) -> dict[tuple[int, int], str]:
    """State by (job, element) of jobs that ended long ago, as accounting knows it; empty without accounting."""
    wanted = ",".join(str(job) for job in sorted(set(jobs)))
    if not wanted or shutil.which("sacct") is None:
        return {}
    command = ["sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={wanted}", "--format=JobID,State"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, check=False)
    found = {}
    for line in done.stdout.splitlines() if done.returncode == 0 else ():
        name, _, state = line.partition("|")
        job, _, index = name.partition("_")
        if job.isdigit() and index.isdigit():
            found[int(job), int(index)] = state.split()[0]  # "CANCELLED by 1000"
    return found


def submit(script: Path, folder: Path, after: Sequence[str] = ()) -> int:
    """Submit ``script`` (relative to ``folder``, the job's first working directory); returns the job's id.

    Args:
        after: what it waits for, such as ``afterok:12``. It is cancelled when that cannot come any more.

    Raises:
        UserError: Slurm refused it.
    """
    said = _call(submit_command(script, folder, after))
    return int(said.strip().split(";")[0])


def submit_command(script: Path, folder: Path, after: Sequence[str] = ()) -> list[str]:
    """What `submit` calls."""
    wait = [f"--dependency={','.join(after)}", "--kill-on-invalid-dep=yes"] if after else []
    return ["sbatch", "--parsable", *wait, f"--chdir={folder}", str(folder / script)]


def check(script: Path, folder: Path) -> None:
    """Have Slurm look at ``script`` without submitting it.

    Raises:
        UserError: Slurm would refuse it.
    """
    _call(["sbatch", "--test-only", f"--chdir={folder}", str(folder / script)])


def requeue(job: str) -> None:
    """Have the running job ``job`` ended and started again later.

    Raises:
        UserError: Slurm does not allow it.
    """
    _call(["scontrol", "requeue", job])


def rename(job: str, name: str) -> None:
    """Give a job a name that people recognise in squeue; one that cannot be renamed stays as it is."""
    subprocess.run(["scontrol", "update", f"JobId={job}", f"JobName={name}"], capture_output=True, check=False)


def fate_of(job: str) -> Fate:
    """What Slurm means to do with the job that asks.

    A job that is cancelled, requeued or out of time is COMPLETING as long as it has processes. One that was requeued
    has a restart more; after the loss of a node it may wait or run again while its last start still lives.
    """
    try:
        said = _call(["scontrol", "--oneliner", "show", "job", job])
    except UserError:
        return "goes on"
    facts = dict(word.split("=", 1) for word in said.split() if "=" in word)
    if int(facts.get("Restarts", 0)) > int(os.environ.get("SLURM_RESTART_COUNT", 0)):
        return "restarts"
    return "ends" if facts.get("JobState") in _ENDING else "goes on"


def _call(command: list[str]) -> str:
    """What a command prints."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]} did not answer within {_PATIENCE} s; is Slurm's controller up?") from None
    if done.returncode != 0:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise UserError(f"{' '.join(command[:2])}: {said}")
    return done.stdout
