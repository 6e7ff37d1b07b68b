"""record.jsonl: written by rank 0, rewound on resume, read by everything that studies runs.

The file holds exactly one step line for every step. A run that resumes from the checkpoint of step s first calls
`rewind`, which moves what lies beyond s out of the way. Fields and units: `record_schema`.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, TypedDict, cast

import msgspec
from pydantic import ValidationError

from ..base.errors import UserError
from ..base.files import sync, write_atomically
from .record_schema import KINDS, SCHEMA, check_line

RECORD = "record.jsonl"
REWOUND = "record.rewound.jsonl"
# What two runs of the same computation may differ in.
VOLATILE = frozenset({"seconds", "tokens_per_second", "tflops", "mfu", "memory_bytes"})

_encode = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode
Line = dict[str, Any]


class _BriefStep(TypedDict):
    """Of a step line what a point and the analysis of noise need. `Step` says what each means."""

    kind: str
    step: int
    tokens: int
    flops: float
    seconds: float
    loss: float | None
    lr: float
    batch_tokens: int
    noise: dict[str, Any] | None


# msgspec refuses what is not JSON, as NaN; it reads three times as fast as json, and skips what is not asked for.
_decode = msgspec.json.Decoder().decode
_decode_step = msgspec.json.Decoder(_BriefStep).decode
_STEP = b'{"kind":"step",'  # how `RecordWriter` begins these lines


def _finite(value: Any) -> Any:
    """``value`` with every number that is not finite replaced by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def encode_line(line: Mapping[str, Any]) -> bytes:
    """One line of a record, newline included. Numbers that are not finite become null."""
    try:
        text = _encode(line)
    except ValueError:  # a NaN or an infinity: rare, so only then is the line walked through
        text = _encode(_finite(line))
    return text.encode() + b"\n"


class RecordWriter:
    """Appends to a run's record. One process (rank 0) owns it; every line is flushed to the operating system.

    Values are plain Python numbers, strings, lists and dictionaries; ``kind`` and ``schema`` are added here.

    Raises:
        ValueError: the file ends in a torn line, so `rewind` was not called.
        OSError: the disk is full or not writable.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / RECORD
        self._file = path.open("a+b")
        size = self._file.seek(0, os.SEEK_END)
        if size:
            self._file.seek(size - 1)
            if self._file.read(1) != b"\n":
                self._file.close()
                raise ValueError(f"{path} ends in a torn line; call rewind() before writing")
        sync(folder)

    def header(self, content: Mapping[str, Any]) -> None:
        self._write({"kind": "header", "schema": SCHEMA, **content})

    def step(self, content: Mapping[str, Any]) -> Line:
        return self._write({"kind": "step", **content})

    def eval(self, content: Mapping[str, Any]) -> Line:
        return self._write({"kind": "eval", **content})

    def event(self, what: str, step: int, why: str, **more: Any) -> None:
        self._write({"kind": "event", "what": what, "step": step, "why": why, **more})

    def end(self, content: Mapping[str, Any]) -> None:
        """The attempt is over; the file is on disk when this returns."""
        self._write({"kind": "end", **content})
        self.sync()

    def sync(self) -> None:
        """Force everything written so far onto the disk. Call it before a checkpoint is declared good."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def _write(self, line: Line) -> Line:
        self._file.write(encode_line(line))
        self._file.flush()
        return line


def rewind(folder: Path, step: int, attempt: int) -> None:
    """Prepare a run's record for going on from the checkpoint of ``step`` (0: from nothing) as ``attempt``.

    Lines up to ``step`` stay, as do headers, events and the end lines of earlier attempts. Step and eval lines
    beyond it move to ``record.rewound.jsonl``, with the ``attempt`` that wrote them and the attempt that moved them
    (``rewound_by``). A torn last line is cut. Both files are replaced by renaming, the moved lines first: a process
    killed in between leaves them in both files, and the next call recognises them.

    Raises:
        UserError: a line is malformed, or the record lacks steps that the checkpoint contains.
    """
    path = folder / RECORD
    if not path.exists():
        return
    content = path.read_bytes()
    lines = _parse(content, path)
    stay: list[bytes] = []
    moved: list[Line] = []
    writer = 0  # the attempt that wrote the lines below the latest header
    kept_steps = []
    for raw, line in lines:
        if line["kind"] == "header":
            writer = line["attempt"]
        if line["kind"] in ("step", "eval") and (line["step"] > step or step == 0):
            moved.append({**line, "attempt": writer, "rewound_by": attempt})
            continue
        if line["kind"] == "step":
            kept_steps.append(line["step"])
        stay.append(raw)
    if kept_steps and kept_steps[-1] != step:
        raise UserError(
            f"{path}: the last step before the checkpoint is {kept_steps[-1]}, but the checkpoint is of step {step}: "
            "lines are missing. Resume from a checkpoint that the record covers, or start in an empty folder"
        )
    if moved:
        _append_rewound(folder / REWOUND, moved)
    kept = b"".join(stay)
    if kept != content:
        write_atomically(path, kept)


def _append_rewound(path: Path, moved: list[Line]) -> None:
    """Add lines to the rewound ones, except those that an interrupted call added already."""
    old = path.read_bytes() if path.exists() else b""
    known = {_identity(json.loads(line)) for line in old.splitlines()}
    new = [encode_line(line) for line in moved if _identity(line) not in known]
    if new:
        write_atomically(path, old + b"".join(new))


def _identity(line: Line) -> str:
    return json.dumps({key: value for key, value in line.items() if key != "rewound_by"}, sort_keys=True)


@dataclass(frozen=True)
class Record:
    """A run's record, its lines sorted by kind and otherwise in order."""

    headers: list[Line] = field(default_factory=list)
    steps: list[Line] = field(default_factory=list)
    evals: list[Line] = field(default_factory=list)
    events: list[Line] = field(default_factory=list)
    end: Line | None = None  # of the latest attempt; None: it runs, or was killed

    @property
    def last_step(self) -> int:
        """Steps done; 0 before the first."""
        return self.steps[-1]["step"] if self.steps else 0

    @property
    def final_evals(self) -> list[Line]:
        """Evaluations after the last step."""
        return [line for line in self.evals if line["step"] == self.last_step]


def read_record(path: Path, *, strict: bool = False, brief: bool = False) -> Record:
    """Read ``path``: a record file, or the folder of a run.

    A last line without its newline is left out: its writer was killed, or is at it now.

    Args:
        strict: also validate every field against the schema.
        brief: of steps, read only what a point and the analysis of noise need, in a third of the time; not together
            with ``strict``.

    Raises:
        UserError: no such file, a newer schema, a malformed line, or steps that do not follow one another.
    """
    path = path / RECORD if path.is_dir() else path
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    record, end, last = Record(), None, 0
    for number, (_, line) in enumerate(_parse(content, path, brief), start=1):
        kind = line["kind"]
        if strict:
            try:
                check_line(line)
            except ValidationError as error:
                problem = error.errors()[0]
                where = ".".join(str(part) for part in problem["loc"][1:])
                raise UserError(f"{path}, line {number}: {kind}.{where}: {problem['msg']}") from None
        if kind == "header":
            record.headers.append(line)
            end = None
        elif kind == "step":
            if record.steps and line["step"] != last + 1:
                raise UserError(f"{path}, line {number}: step {line['step']} follows step {last}")
            last = line["step"]
            record.steps.append(line)
        elif kind == "eval":
            record.evals.append(line)
        elif kind == "event":
            record.events.append(line)
        else:
            end = line
    return Record(record.headers, record.steps, record.evals, record.events, end)


def _parse(content: bytes, path: Path, brief: bool = False) -> list[tuple[bytes, Line]]:
    """The whole lines of a record, raw and parsed, with what every reader relies on checked."""
    lines: list[tuple[bytes, Line]] = []
    for number, raw in enumerate(BytesIO(content), start=1):
        if not raw.endswith(b"\n"):
            break  # torn: only the last line can lack its newline
        line = _brief_step(raw) if brief and lines else None
        lines.append((raw, line or _whole_line(raw, path, number)))
    return lines


def _brief_step(raw: bytes) -> Line | None:
    """None: no step, or not as `RecordWriter` writes it."""
    if not raw.startswith(_STEP):
        return None
    try:
        return cast(Line, _decode_step(raw))
    except (ValueError, RecursionError):
        return None


def _whole_line(raw: bytes, path: Path, number: int) -> Line:
    try:
        line = _decode(raw)
    except (ValueError, RecursionError) as error:  # of the first are msgspec's errors and UTF-8's
        raise UserError(f"{path}, line {number}: not valid JSON: {error}") from None
    kind = line.get("kind") if isinstance(line, dict) else None
    if kind == "header" and line.get("schema") != SCHEMA:
        raise UserError(
            f"{path}, line {number}: schema {line.get('schema')}, while this version reads {SCHEMA}; "
            "read it with the version of moescale that wrote it"
        )
    if kind not in KINDS:
        raise UserError(f"{path}, line {number}: kind {kind!r} is none of {', '.join(KINDS)}")
    if number == 1 and kind != "header":
        raise UserError(f"{path}, line 1: a record starts with a header, not with kind {kind!r}")
    needed = {"header": "attempt", "step": "step", "eval": "step"}.get(kind)
    if needed and not isinstance(line.get(needed), int):
        raise UserError(f"{path}, line {number}: {kind}.{needed} is missing or no whole number")
    return cast(Line, line)


def same(record_a: Record, record_b: Record) -> list[str]:
    """Differences between two records by the comparison rule; empty: the same computation.

    Steps and evaluations are compared to the last bit. Headers, events and the fields that depend on the machine's
    mood (`VOLATILE`) are ignored; of the end only state and totals count.
    """
    found = _differ("step", _by_key(record_a.steps), _by_key(record_b.steps))
    found += _differ("eval", _by_key(record_a.evals), _by_key(record_b.evals))
    ends = [
        {key: end[key] for key in ("state", "totals") if key in end} if end else None
        for end in (record_a.end, record_b.end)
    ]
    return found + _differ("end", ends[0], ends[1])


def _by_key(lines: list[Line]) -> dict[str, Line]:
    return {" ".join(str(line[key]) for key in ("step", "domain") if key in line): line for line in lines}


def _differ(where: str, a: Any, b: Any) -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [key for key in {**a, **b} if key not in VOLATILE]
        missing = "(missing)"
        return [text for key in keys for text in _differ(f"{where} {key}", a.get(key, missing), b.get(key, missing))]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [text for i, pair in enumerate(zip(a, b, strict=True)) for text in _differ(f"{where}[{i}]", *pair)]
    if a == b:
        return []
    shown = ["(a whole line)" if isinstance(value, dict) else repr(value) for value in (a, b)]
    return [f"{where}: {shown[0]} against {shown[1]}"]
