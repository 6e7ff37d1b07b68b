"""Registered predictions against what was measured afterwards."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..base.files import write_atomically
from .points import Point
from .register import Registered


@dataclass(frozen=True)
class Outcome:
    """One prediction and its run.

    Attributes:
        fit: name of the fit's file.
        low, high: 95 % interval of the prediction, nats a token.
        measured: loss, nats a token; None: not measured yet.
        error: measured minus predicted, nats a token.
        share: ``error`` over the prediction.
        inside: whether the measured loss lies in the interval.
        registered: UTC, ISO 8601.
        when: how far the run was by then, in words.
        before: registered before the run's first step.
        ended: when the run ended, likewise; empty where that is not known.
        faults: why the entry cannot be believed; empty: its chain, its fit and its run are what they were.
    """

    run: str
    family: str
    law: str
    fit: str
    predicted: float
    low: float
    high: float
    measured: float | None
    error: float | None
    share: float | None
    inside: bool | None
    registered: str
    when: str
    before: bool
    ended: str
    hash: str
    faults: tuple[str, ...]

    @property
    def counts(self) -> bool:
        """Whether it is a test of the law: measured, registered before, and intact."""
        return self.measured is not None and self.before and not self.faults


def outcomes(
    entries: Sequence[Registered], points: Sequence[Point], hashes: Mapping[str, str], ended: Mapping[str, float]
) -> list[Outcome]:
    """Every entry of a register beside its run's point.

    Args:
        hashes: run -> scientific hash of its record.
        ended: run -> when it ended, seconds since the epoch.
    """
    by_run = {point.run: point for point in points}
    return [_outcome(one, by_run.get(one.prediction.run), hashes, ended) for one in entries]


def _outcome(entry: Registered, point: Point | None, hashes: Mapping[str, str], ended: Mapping[str, float]) -> Outcome:
    said = entry.prediction
    low, value, high = said.loss.low, said.loss.value, said.loss.high
    measured = point.loss if point is not None and point.state == "done" else None
    error = None if measured is None else measured - value
    faults = entry.faults
    if said.scientific_hash not in (None, hashes.get(said.run, said.scientific_hash)):
        faults = (*faults, "the run that was trained has another configuration than the one predicted")
    return Outcome(
        run=said.run,
        family=point.family if point is not None else "",
        law=said.law,
        fit=Path(said.fit).stem,
        predicted=value,
        low=low,
        high=high,
        measured=measured,
        error=error,
        share=None if error is None else error / value,
        inside=None if measured is None else low <= measured <= high,
        registered=said.time,
        when=_when(said.steps, said.after),
        before=said.steps == 0 and not said.after,
        ended=datetime.fromtimestamp(ended[said.run], UTC).isoformat(timespec="seconds") if said.run in ended else "",
        hash=entry.hash,
        faults=faults,
    )


def _when(steps: int | None, after: bool) -> str:
    if after:
        return "after the run"
    if steps is None:
        return "not known"
    return f"at step {steps} of the run" if steps else "before the run began"


def as_json(found: Sequence[Outcome]) -> list[dict[str, Any]]:
    """A list for summaries."""
    return [{**asdict(one), "faults": list(one.faults)} for one in found]


def write_outcomes(path: Path, found: Sequence[Outcome]) -> None:
    """Write a CSV with a row for each prediction."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(Outcome.__dataclass_fields__), lineterminator="\n")
    writer.writeheader()
    for one in found:
        row = {key: "" if value is None else value for key, value in asdict(one).items()}
        writer.writerow({**row, "faults": "; ".join(one.faults)})
    write_atomically(path, text.getvalue())
