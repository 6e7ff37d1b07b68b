"""What collecting needs of a run: its point, and the lines of its record that the analysis reads.

A record has a line for every step, gigabytes in a large study. So a run that ends leaves this beside its record, in
``condensed.json``; where that is missing or out of date the record is read, and it is left then.
"""

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import msgspec

from ..base.files import digest, write_atomically
from . import noise, points, record
from .points import Point, point_from_record
from .record import RECORD, Record, read_record

CONDENSED = "condensed.json"
_OF_STEP = ("kind", "step", "loss", "batch_tokens", "noise")
# What decides what is kept.
_MODULES = (Path(__file__), *(Path(str(module.__file__)) for module in (noise, points, record)))


@dataclass(frozen=True)
class Condensed:
    """A run that has started.

    Attributes:
        point: run, family and check are the caller's to set.
        record: of its steps those that measured the gradient noise scale, and the last, with what the analysis reads
            of them; no events.
    """

    point: Point
    record: Record


@dataclass(frozen=True)
class _Kept:
    """The file: what was condensed, from which state of the record, and by which code."""

    made_by: str
    stamp: tuple[int, int, int]
    content: Condensed


_decode, _encode = msgspec.json.Decoder(_Kept).decode, msgspec.json.Encoder().encode


def condense(whole: Record) -> Condensed:
    """What is kept of a record that has a header."""
    last = whole.last_step
    steps = [{key: step[key] for key in _OF_STEP} for step in whole.steps if step["noise"] or step["step"] == last]
    return Condensed(point_from_record(whole, name="", family=""), replace(whole, steps=steps, events=[]))


def read_condensed(folder: Path) -> Condensed | None:
    """The run in ``folder`` condensed; None if its record has no header yet. Leaves ``condensed.json`` up to date.

    Raises:
        UserError: the record is damaged.
    """
    try:
        state = (folder / RECORD).stat()  # before reading: a line that is added meanwhile makes it out of date
    except FileNotFoundError:
        return None
    stamp = (state.st_size, state.st_mtime_ns, state.st_ino)
    kept = _kept(folder / CONDENSED)
    if kept is not None and (kept.made_by, kept.stamp) == (_made_by(), stamp):
        return kept.content
    whole = read_record(folder / RECORD, brief=True)
    if not whole.headers:
        return None
    content = condense(whole)
    write_atomically(folder / CONDENSED, _encode(_Kept(_made_by(), stamp, content)), durable=False)
    return content


def _kept(path: Path) -> _Kept | None:
    """None where there is nothing, or nothing to be understood."""
    try:
        return _decode(path.read_bytes())
    except (OSError, ValueError):
        return None


@cache
def _made_by() -> str:
    """Names the code whose results are kept."""
    return digest([path.read_text(encoding="utf-8") for path in _MODULES])
