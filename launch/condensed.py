"""What collecting needs of the runs of a study: their points, and the lines of their records that the analysis reads.

Records have a line for every step, gigabytes in a large study. So what was read is kept in ``collected.jsonl``, and a
record is read again only when it has changed.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from ..base.files import digest, write_atomically
from ..scaling import noise, points, record
from ..scaling.points import Point, point_from_record
from ..scaling.record import RECORD, Record, read_record
from .planned import ImpossibleRun, PlannedRun
from .study_folder import StudyFolder

_KEPT = ("kind", "step", "loss", "batch_tokens", "noise")  # of a step
_decode, _encode = msgspec.json.Decoder().decode, msgspec.json.Encoder().encode
# What decides what is kept.
_MODULES = (Path(__file__), *(Path(str(module.__file__)) for module in (noise, points, record)))


@dataclass(frozen=True)
class Condensed:
    """A run that has started.

    Attributes:
        point: family and check are the caller's to add.
        record: of its steps those that measured the gradient noise scale, and the last, with what the analysis reads
            of them; no events.
    """

    point: Point
    record: Record


def read_condensed(folder: StudyFolder, runs: Iterable[PlannedRun | ImpossibleRun]) -> dict[str, Condensed]:
    """Every run of ``runs`` that has a record with a header, by name; brings ``collected.jsonl`` up to date.

    Raises:
        UserError: a record is damaged.
    """
    known = _known(folder.condensed)
    lines, found = {}, {}
    for run in runs:
        path = folder.run(run.name) / RECORD
        try:
            state = path.stat()  # before reading: a line that is added meanwhile makes it out of date
        except FileNotFoundError:
            continue
        stamp = [state.st_size, state.st_mtime_ns, state.st_ino]
        line = known.get(run.name)
        if line is not None and line["stamp"] == stamp:
            lines[run.name], found[run.name] = line, Condensed(Point(**line["point"]), Record(**line["record"]))
        elif (whole := read_record(path, brief=True)).headers:
            kept = condense(run.name, whole)
            lines[run.name] = {
                "run": run.name,
                "stamp": stamp,
                "point": vars(kept.point),  # as asdict() has it, which would copy everything below too
                "record": vars(kept.record),
            }
            found[run.name] = kept
    if lines != known:
        written = ({"made_by": _made_by()}, *lines.values())
        write_atomically(folder.condensed, b"".join(_encode(line) + b"\n" for line in written))
    return found


def condense(name: str, whole: Record) -> Condensed:
    """What is kept of a run."""
    last = whole.last_step
    steps = [{key: step[key] for key in _KEPT} for step in whole.steps if step["noise"] or step["step"] == last]
    return Condensed(point_from_record(whole, name, family=""), replace(whole, steps=steps, events=[]))


def _known(path: Path) -> dict[str, dict[str, Any]]:
    """Lines by run; none where they are from other code, or not to be understood."""
    try:
        with path.open("rb") as file:
            if _decode(file.readline()) != {"made_by": _made_by()}:
                return {}
            return {line["run"]: line for line in map(_decode, file)}
    except (OSError, ValueError):
        return {}


def _made_by() -> str:
    """Names the code whose results are kept."""
    return digest([path.read_text(encoding="utf-8") for path in _MODULES])
