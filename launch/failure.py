"""Why a run failed, in words, whether or not it could say so itself."""

import signal
from contextlib import suppress
from pathlib import Path

from ..training.status import read_status, write_status

# What Python, numpy, torch and C++ say when there is no memory left.
_MEMORY = "out of memory: "
_NO_MEMORY = ("MemoryError", "Unable to allocate", "can't allocate memory", "out of memory", "bad_alloc")


def explain_failure(folder: Path, log: Path, began: float, code: int, *, offset: int = 0) -> str:
    """Why the attempt that ``began`` (seconds since the epoch) ended with exit code ``code``, below 0 for a signal.

    What the run could not say itself, or not in words, is written into its status.

    Args:
        offset: where the attempt's own output begins in ``log``.
    """
    status = read_status(folder)
    said = None
    if status is not None and status.state == "failed" and status.updated >= began:
        said = status.reason
    if said and not any(words in said for words in _NO_MEMORY):
        return said
    if said:
        reason = f"{_MEMORY}{said.splitlines()[0]}; lower workers, training.micro_batch or the size of the model"
    elif code == -signal.SIGKILL:
        reason = "killed by SIGKILL; if nobody did that, the machine ran out of memory: lower workers"
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
    return reason.startswith(_MEMORY)


def _last_words(log: Path, offset: int) -> str:
    """The last error of ours in a log, or else its last line; srun and torchrun speak after the rank they started."""
    with log.open("rb") as file:
        file.seek(offset)
        lines = file.read().decode(errors="replace").split("\n")
    said = [line.strip() for line in lines if line.strip() and not line.startswith("srun: ")]
    errors = [line for line in said if line.startswith("error")]
    last = (errors or said or ["said nothing"])[-1]
    return last.removeprefix("error: ")
