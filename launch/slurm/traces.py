"""How an element of an array ended, by what it left in the study's folder: for clusters without accounting."""

import re
from pathlib import Path

from .attempts import Attempts

# What slurmstepd writes into a job's log when it ends the job, most telling first; then the state's name in sacct.
_SAID = (
    (re.compile(rb"oom.kill event.* in StepId=\d+\.batch"), "OUT_OF_MEMORY"),
    (re.compile(rb"DUE TO TIME LIMIT"), "TIMEOUT"),
    (re.compile(rb"DUE TO NODE FAILURE"), "NODE_FAIL"),
    (re.compile(rb"DUE TO PREEMPTION"), "PREEMPTED"),
    (re.compile(rb"CANCELLED AT"), "CANCELLED"),
)
_TAIL = 1 << 14  # bytes


def verdict_in_logs(study: Path, job: int, index: int) -> str:
    """How element ``index`` of array ``job`` ended, in Slurm's words, as its log tells; empty if it does not."""
    for log in study.glob(f"slurm/*/*-{job}-{index}.log"):
        with log.open("rb") as file:
            file.seek(max(file.seek(0, 2) - _TAIL, 0))
            said = file.read()
        # The supervisor's line of a start: what stands before it is of starts before.
        last = said.rpartition(b" as job ")[2]
        for words, state in _SAID:
            if words.search(last):
                return state
    return ""


def last_start(run: Path) -> str:
    """What became of a run's last start under Slurm, as its ``attempts.jsonl`` tells; empty if it never started."""
    starts = Attempts(run).starts
    if not starts:
        return ""
    start, end = starts[-1]
    if end is None:
        return f"start {start.number} on {start.host} left no end: killed, or lost with its node"
    return f"start {start.number} on {start.host} ended: {end.outcome}"
