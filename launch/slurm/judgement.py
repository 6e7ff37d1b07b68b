"""How a start of a run ended, told from its exit code, its status and its log."""

import re
from pathlib import Path
from typing import NamedTuple

from ...base.errors import EXIT_BAD_INPUT
from ...training.status import read_status
from ..failure import explain_failure, is_memory
from .attempts import Outcome

# torchrun turns every exit code into 1, and lists its ranks' own (torch/distributed/elastic/multiprocessing/errors).
_RANK_CODE = re.compile(rb"^\s*exitcode\s*: (-?\d+) ", re.MULTILINE)
_ENDED_BY_TORCHRUN = -15
_NOT_FINITE = "not finite"
_MEND = "study resubmit asks for twice the memory; or lower training.micro_batch or the size of the model"


class Judgement(NamedTuple):
    """What became of a start, and why."""

    outcome: Outcome
    reason: str


def judge(folder: Path, log: Path, offset: int, began: float, code: int, starved: bool | None) -> Judgement:
    """Judge the start that ``began`` (seconds since the epoch) and whose command ended with ``code``.

    Args:
        offset: where this start's output begins in ``log``.
        code: as srun gives it: 128 + n for a rank that signal n killed.
        starved: whether this node's kernel killed processes for want of memory meanwhile; None: not known.
    """
    status = read_status(folder)
    if status is not None and status.state == "done":
        return Judgement("done", "")
    if status is not None and status.state == "preempted" and status.updated >= began:
        return Judgement("stopped", status.reason or "asked to stop")
    codes = _codes_of_ranks(log, offset) or {code}
    # That this node lacked no memory says nothing of the others.
    reason = explain_failure(
        folder, log, began, 128 - code if code > 128 else code, offset=offset, starved=starved or None, mend=_MEND
    )
    if codes == {EXIT_BAD_INPUT}:
        return Judgement("input", reason)
    if is_memory(reason):
        return Judgement("memory", reason)
    return Judgement("nonfinite" if _NOT_FINITE in reason else "crash", reason)


def _codes_of_ranks(log: Path, offset: int) -> set[int]:
    """Exit codes of ranks under torchrun, without those that it ended itself."""
    with log.open("rb") as file:
        file.seek(offset)
        found = {int(code) for code in _RANK_CODE.findall(file.read())}
    return found - {_ENDED_BY_TORCHRUN}
