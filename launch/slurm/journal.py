"""``journal.jsonl`` of a study: what was submitted, when, as which jobs, with which code. Lines are only appended.

A batch has two lines: ``submitting`` before Slurm is asked, so that nothing is forgotten if the process dies then, and
``submitted`` with the job's id.
"""

import getpass
import socket
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from ...base.files import append_line, read_lines
from ...compat.versions import source_digest
from ...version import __version__
from .shapes import Batch


@dataclass(frozen=True)
class Submitted:
    """A batch that Slurm was asked to take. ``job`` is None as long as nobody knows whether it did."""

    tag: str
    runs: tuple[str, ...]
    memory_mb: int
    job: int | None


@dataclass(frozen=True)
class Owner:
    """The array element that a run was last submitted as."""

    job: int
    index: int
    memory_mb: int


class Journal:
    """The journal in a study's folder. Writers hold the study's lock."""

    def __init__(self, folder: Path):
        self._path = folder / "journal.jsonl"

    def submitting(self, tag: str, script: Path, cluster: str, batch: Batch | None, world: int | None) -> None:
        """Slurm is about to be asked; ``batch`` None: for a job that serves all runs. ``world`` as `plan_study`'s."""
        append_line(
            self._path,
            {
                "kind": "submitting",
                "time": _now(),
                "tag": tag,
                "runs": batch.runs if batch else [],
                "shape": asdict(batch.shape) if batch else None,
                "world": world,
                "cluster": cluster,
                "script": str(script),
                "version": __version__,
                "source": source_digest(),
                "user": getpass.getuser(),
                "host": socket.gethostname(),
            },
        )

    def submitted(self, tag: str, job: int) -> None:
        """Slurm took it."""
        append_line(self._path, {"kind": "submitted", "time": _now(), "tag": tag, "job": job})

    def refused(self, tag: str, why: str) -> None:
        """Slurm did not take it."""
        append_line(self._path, {"kind": "refused", "time": _now(), "tag": tag, "why": why})

    def batches(self) -> list[Submitted]:
        """All batches that were not refused, in order."""
        found: dict[str, Submitted] = {}
        for line in read_lines(self._path):
            if line["kind"] == "submitting":
                found[line["tag"]] = Submitted(
                    line["tag"], tuple(line["runs"]), (line["shape"] or {}).get("memory_mb", 0), None
                )
            elif line["kind"] == "refused":
                found.pop(line["tag"], None)
            elif line["kind"] == "submitted" and line["tag"] in found:
                before = found[line["tag"]]
                found[line["tag"]] = Submitted(before.tag, before.runs, before.memory_mb, line["job"])
        return list(found.values())

    def world(self) -> int | None:
        """Ranks of each run, as the last submission was asked to give them."""
        given = [line["world"] for line in read_lines(self._path) if line["kind"] == "submitting"]
        return given[-1] if given else None


def owners(batches: Iterable[Submitted]) -> dict[str, Owner]:
    """The latest array element of each run that was ever submitted."""
    return {
        run: Owner(batch.job, index, batch.memory_mb)
        for batch in batches
        if batch.job is not None
        for index, run in enumerate(batch.runs)
    }


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
