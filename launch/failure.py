"""Why a run failed, in words, whether or not it could say so itself."""

import re
import signal
from contextlib import suppress
from pathlib import Path

from ..training.status import read_status, write_status

# What Python, numpy, torch and C++ say when there is no memory left.
_MEMORY = "out of memory: "
_NO_MEMORY = ("MemoryError", "Unable to allocate", "can't allocate memory", "out of memory", "bad_alloc")
# What the survivors say of a rank that was killed (parallel/failure.py): they cannot know for what.
_WITHOUT_A_WORD = "ended without a word"
# What slurmstepd and srun say when a limit on memory has killed a process of the step; srun then ends with 1.
_KILLED_BY_SLURM = re.compile(rb"^srun: error: .*: Out Of Memory$|^slurmstepd.*: error: .*oom.kill event", re.MULTILINE)

MEND_HERE = "lower workers, training.micro_batch or the size of the model"


def kernel_kills() -> int | None:
    """Processes that this host's kernel has killed for want of memory, a cgroup's limit included; None: it never tells.

    A container sees the count of its host.
    """
    with suppress(OSError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return None


def starved_since(before: int | None) -> bool | None:
    """Whether `kernel_kills` has grown since it was ``before``; None where nobody knows."""
    now = kernel_kills()
    return None if before is None or now is None else now > before


def explain_failure(
    folder: Path,
    log: Path,
    began: float,
    code: int,
    *,
    offset: int = 0,
    starved: bool | None = None,
    mend: str = MEND_HERE,
) -> str:
    """Why the attempt that ``began`` (seconds since the epoch) ended with exit code ``code``, below 0 for a signal.

    What the run could not say itself, or not in words, is written into its status.

    Args:
        offset: where the attempt's own output begins in ``log``.
        starved: whether the kernel killed processes for want of memory meanwhile; None: not known.
        mend: what to do when memory has run out.
    """
    status = read_status(folder)
    said = None
    if status is not None and status.state == "failed" and status.updated >= began:
        said = status.reason
    killed = code == -signal.SIGKILL or (said is not None and _WITHOUT_A_WORD in said)
    if (starved and killed) or _slurm_killed(log, offset):
        reason = f"{_MEMORY}{said.splitlines()[0] if said else 'killed for exceeding what it was given'}; {mend}"
    elif said and (_WITHOUT_A_WORD in said or not any(words in said for words in _NO_MEMORY)):
        return said
    elif said:
        reason = f"{_MEMORY}{said.splitlines()[0]}; {mend}"
    elif killed and starved is False:
        reason = "killed by SIGKILL from outside; the kernel killed nothing for want of memory"
    elif killed:
        reason = f"killed by SIGKILL; if nobody did that, the machine had no memory left: {mend}"
    elif code < 0:
        reason = f"killed by {signal.Signals(-code).name}; see {log}"
    else:
        reason = f"exit code {code}: {_last_words(log, offset)}; see {log}"
    step, total = (status.step, status.steps_total) if status else (0, 0)
    attempt = status.attempt if status else 1
    with suppress(OSError):  # a full disk must not end the whole study
        write_status(folder, "failed", reason=reason, step=step, steps_total=total, attempt=attempt)
    return reason


def is_memory(reason: str) -> bool:
    """Whether `explain_failure` found that memory had run out."""
    return _MEMORY in reason


def _output(log: Path, offset: int) -> bytes:
    try:
        with log.open("rb") as file:
            file.seek(offset)
            return file.read()
    except FileNotFoundError:
        return b""


def _slurm_killed(log: Path, offset: int) -> bool:
    return _KILLED_BY_SLURM.search(_output(log, offset)) is not None


def _last_words(log: Path, offset: int) -> str:
    """The last error of ours in a log, or else its last line; srun and torchrun speak after the rank they started."""
    lines = _output(log, offset).decode(errors="replace").split("\n")
    said = [line.strip() for line in lines if line.strip() and not line.startswith("srun: ")]
    errors = [line for line in said if line.startswith("error")]
    last = (errors or said or ["said nothing"])[-1]
    return last.removeprefix("error: ")
