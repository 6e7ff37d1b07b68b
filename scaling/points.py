"""Points: one row for each run, from records or from anybody's CSV file."""

import csv
import io
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import numpy as np

from ..base.errors import UserError
from ..base.files import write_atomically
from .laws import Array, Law
from .noise import NoiseEstimate, average
from .record import Record
from .record_schema import HELD_OUT

LAST_SHARE = 0.1  # of the steps, over which the training loss is averaged
CHECKS = ("", "lr")  # what a run only checks
FUTURES = ("", "training", "always")  # when later tokens decide where earlier ones are routed


@dataclass(frozen=True)
class Point:
    """One run. None: not known, or (loss) the run did not finish.

    Attributes:
        run: its name.
        family: what curves are drawn through, for example dense or E8G4.
        state: done, preempted, failed or running.
        why: why it ended, when it did not end well.
        check: "lr" for a run that only checks the learning rate: left out of every comparison and fit.
        future: "training" or "always" where a token's output depends on later tokens in training, or in evaluation
            too: then the loss is not a language model's, and left out of every comparison and fit.
        seed: of initialisation and data order.
        n: the law's N, in tables that hold one count only; ours hold n_total and n_active.
        n_total, n_active: non-embedding parameters, all and those that one token uses.
        n_embedding: embedding and head parameters.
        n_router: parameters of all routers, part of n_total and n_active; 0 for a dense model.
        d: training tokens.
        c: training FLOPs, exact.
        c_6nd: 6 n_active d.
        e, k: routed experts of a layer and of a token; 1 and 1 for a dense model.
        g: granularity, 4 x model width / expert width; 1 for a dense model.
        s: sparsity, 1 - k / e.
        shared: shared experts.
        b: tokens in a batch.
        lr: peak learning rate.
        loss: final loss on held-out documents of the training domains, nats a token.
        train_loss: training loss, mean over the last tenth of the steps, nats a token.
        bits_per_byte: of the same evaluation as ``loss``.
        b_simple: gradient noise scale over the last half of the run, tokens.
        tokens_per_second: over the whole run.
        seconds: wall time of all steps.
        extra: numbers under other names, which were asked for when the table was read.
    """

    run: str
    family: str = ""
    state: str = "done"
    why: str = ""
    check: str = ""
    future: str = ""
    seed: int | None = None
    n: float | None = None
    n_total: float | None = None
    n_active: float | None = None
    n_embedding: float | None = None
    n_router: float | None = None
    d: float | None = None
    c: float | None = None
    c_6nd: float | None = None
    e: float | None = None
    k: float | None = None
    g: float | None = None
    s: float | None = None
    shared: float | None = None
    b: float | None = None
    lr: float | None = None
    loss: float | None = None
    train_loss: float | None = None
    bits_per_byte: float | None = None
    b_simple: float | None = None
    tokens_per_second: float | None = None
    seconds: float | None = None
    extra: Mapping[str, float] = field(default_factory=dict, hash=False)

    def number(self, name: str) -> float | None:
        """The value under that name, of a field or an extra one; None where it is not known or no number."""
        value = getattr(self, name) if name in COLUMNS else self.extra.get(name)
        return float(value) if isinstance(value, int | float) else None


COLUMNS = tuple(one.name for one in fields(Point) if one.name != "extra")
_TEXT = tuple(one.name for one in fields(Point) if one.type is str)
_WHOLE = tuple(one.name for one in fields(Point) if get_args(one.type) == (int, NoneType))


def point_from_record(record: Record, name: str, family: str, check: str = "") -> Point:
    """The point that a run's record amounts to.

    Raises:
        UserError: the record has no header yet.
    """
    if not record.headers:
        raise UserError(f"run {name}: its record has no header, so it never started")
    header = record.headers[-1]
    counts, mixture = header["parameters"], header["mixture"]
    last = record.steps[-1] if record.steps else {}
    state = record.end["state"] if record.end else "running"
    final = _final_evaluation(record) if state == "done" else {}
    seconds = sum(step["seconds"] for step in record.steps)
    routed, active = (mixture["experts"], mixture["active"]) if mixture else (1, 1)
    tokens = last.get("tokens")
    trained_here = sum(step["batch_tokens"] for step in record.steps)  # of a branch: without its trunk
    return Point(
        run=name,
        family=family,
        state=state,
        why=record.end["why"] if record.end and state != "done" else "",
        check=check,
        future=_future(mixture),
        seed=header["seed"],
        n_total=counts["total"],
        n_active=counts["active"],
        n_embedding=counts["embedding"],
        n_router=counts["router"],
        d=tokens,
        c=last.get("flops"),
        c_6nd=header["flops_per_token"]["six_n"] * tokens if tokens else None,
        e=routed,
        k=active,
        g=mixture["granularity"] if mixture else 1,
        s=1 - active / routed,
        shared=mixture["shared"] if mixture else 0,
        b=last.get("batch_tokens"),
        lr=max((step["lr"] for step in record.steps), default=None),
        loss=final.get("loss"),
        train_loss=_train_loss(record),
        bits_per_byte=final.get("bits_per_byte"),
        b_simple=_late_noise(record),
        tokens_per_second=trained_here / seconds if seconds else None,
        seconds=seconds or None,
    )


def _future(mixture: Mapping[str, Any] | None) -> str:
    """Records of before the routers that can look ahead do not speak of it."""
    found = (mixture or {}).get("future", "never")
    return "" if found == "never" else found


def _final_evaluation(record: Record) -> dict[str, Any]:
    found = [line for line in record.final_evals if line["domain"] == HELD_OUT]
    return found[-1] if found else {}


def _train_loss(record: Record) -> float | None:
    losses = [step["loss"] for step in record.steps[-max(math.ceil(LAST_SHARE * len(record.steps)), 1) :]]
    return float(np.mean(losses)) if losses and None not in losses else None


def _late_noise(record: Record) -> float | None:
    half = record.last_step // 2
    parts = [step["noise"]["all"] for step in record.steps if step["noise"] and step["step"] > half]
    measured = [NoiseEstimate(p["g2"], p["trace"], p["b_simple"]) for p in parts if None not in (p["g2"], p["trace"])]
    return average(measured).b_simple if measured else None


def write_points(path: Path, points: Sequence[Point]) -> None:
    """Write a points table as CSV; floats in full, None as an empty field."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for point in points:
        writer.writerow(["" if (value := getattr(point, name)) is None else value for name in COLUMNS])
    write_atomically(path, text.getvalue())


def read_points(path: Path, mapping: Mapping[str, str] | None = None, extra: Collection[str] = ()) -> list[Point]:
    """Read a points table: ours, or any CSV file with a header line.

    Columns that carry a point's field names are taken as these; other columns are ignored.

    Args:
        mapping: field of `Point`, or name in ``extra`` -> column of the file, where the names differ.
        extra: names besides a point's fields that are read too, into ``Point.extra``.

    Raises:
        UserError: no such file, an unknown field, a missing column, a value that is no number (column and row named).
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            header = reader.fieldnames or []
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    known = tuple(dict.fromkeys((*COLUMNS, *extra)))
    source = {name: name for name in known if name in header}
    for name, column in (mapping or {}).items():
        if name not in known:
            raise UserError(f"--map {name}={column}: {name} is not known; the fields are {', '.join(known)}")
        if column not in header:
            raise UserError(f"--map {name}={column}: {path} has no column {column}; it has {', '.join(header)}")
        source[name] = column
    if not rows:
        raise UserError(f"{path}: no rows")
    if "loss" not in source:
        raise UserError(f"{path}: no column loss; name yours with --map loss=COLUMN (it has {', '.join(header)})")
    return [_point(path, number, row, source) for number, row in enumerate(rows, start=1)]


def _point(path: Path, number: int, row: Mapping[str, str | None], source: Mapping[str, str]) -> Point:
    values: dict[str, Any] = {"run": f"row {number}"}
    extra: dict[str, float] = {}
    for name, column in source.items():
        text = (row[column] or "").strip()
        if name in _TEXT:
            values[name] = text or values.get(name, "")
        elif text:
            try:
                value = float(text)
                if name in COLUMNS:
                    values[name] = int(value) if name in _WHOLE else value
                else:
                    extra[name] = value
            except (ValueError, OverflowError):
                raise UserError(f"{path}, row {number}, column {column}: {text!r} is not a number") from None
    for name, known in (("check", CHECKS), ("future", FUTURES)):
        if values.get(name, "") not in known:
            raise UserError(
                f"{path}, row {number}, column {name}: {values[name]!r} is not known; it is empty or "
                f"{' or '.join(known[1:])}"
            )
    return Point(**values, extra=extra)


def column(points: Sequence[Point], law: Law, variable: str) -> Array:
    """A law's variable over points [n]; ``n`` is the count that the law means where a table has no ``n``.

    Raises:
        UserError: a point has no such value.
    """
    found = []
    for point in points:
        value = point.number(variable)
        if value is None and variable == "n" and law.n_counts:
            value = point.number(law.n_counts)
        if value is None:
            wanted = f"{variable} (or {law.n_counts})" if variable == "n" else variable
            raise UserError(f"run {point.run}: no {wanted}, which law {law.name} needs; name its column with --map")
        found.append(value)
    return np.array(found)


def mapped(point: Point, columns: Mapping[str, str]) -> Point:
    """``point`` with what it has in ``columns`` under the variables that these were mapped to, as ``n: n_total``."""
    values = {variable: getattr(point, name) for variable, name in columns.items()}
    extra = {variable: value for variable, value in values.items() if variable not in COLUMNS}
    own = {variable: value for variable, value in values.items() if variable in COLUMNS}
    return replace(point, **own, extra={**point.extra, **extra})


def variables_of(points: Sequence[Point], law: Law) -> tuple[dict[str, Array], Array, list[Point]]:
    """What `fit` takes: the law's variables and the loss, each [n], and the finished points they come from.

    Runs that only check a setting are left out, and those whose evaluation knows later tokens.

    Raises:
        UserError: no point has a loss, or one that has lacks a variable.
    """
    used = [
        point
        for point in points
        if point.state == "done" and point.loss is not None and not point.check and point.future != "always"
    ]
    if not used:
        raise UserError("no finished run with a loss among the points: nothing to fit")
    loss = np.array([point.loss for point in used], dtype=float)
    return {name: column(used, law, name) for name in law.variables}, loss, used
