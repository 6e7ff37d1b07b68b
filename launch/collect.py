"""From run folders to points, fits and a report."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..base.errors import UserError
from ..scaling.analysis import analyse
from ..scaling.condensed import Condensed, condense, read_condensed
from ..scaling.downstream import answered, write_answered
from ..scaling.findings import findings
from ..scaling.fit import Fit
from ..scaling.isoflop import best_loss_fits, profiles
from ..scaling.laws import law_named
from ..scaling.outcomes import Outcome, outcomes, write_outcomes
from ..scaling.outcomes import as_json as outcomes_json
from ..scaling.points import COLUMNS, Point, mapped, write_points
from ..scaling.record import RECORD, Record, read_record
from ..scaling.register import Register
from ..scaling.seeds import seed_noise
from ..training.status import read_status
from .fitting import fit_points
from .planned import ImpossibleRun, PlannedRun
from .study_config import FitRequest, StudyConfig
from .study_folder import StudyFolder

BOOTSTRAP = 400  # resamplings behind an interval


@dataclass(frozen=True)
class Collected:
    """What a study has shown so far. ``warnings`` are about fits that could not be made."""

    study: StudyConfig
    points: list[Point]
    records: dict[str, Record]
    fits: dict[str, Fit]
    warnings: list[str]
    outcomes: list[Outcome]

    def headlines(self) -> list[str]:
        """The main results, a sentence each."""
        return findings(analyse(self.points, self.records, self.fits, self.outcomes))


def collect(folder: StudyFolder, *, whole: bool = False) -> Collected:
    """Read all runs of the study in ``folder``; write ``points.csv``, ``downstream.csv``, ``predictions.csv`` and
    ``fits/``.

    Args:
        whole: read every line of every record, for what happened inside runs; else records are as `Condensed` has them.

    Raises:
        UserError: no study there, no run of it has started, or a record is damaged.
    """
    study, expansion = folder.open()
    runs = expansion.everything
    read = {run.name: _read(folder.run(run.name), whole) for run in runs}
    records = {name: condensed.record for name, condensed in read.items() if condensed is not None}
    points = [point for run in runs if (point := _point(folder, run, read[run.name])) is not None]
    if not points:
        raise UserError(f"{folder.path}: no run of the study {study.name} has started yet; start them with study run")
    write_points(folder.points, points)
    asked = answered(points, records)
    if asked:
        write_answered(folder.downstream, asked)
    else:
        folder.downstream.unlink(missing_ok=True)
    fits, warnings = _fits(study, points)
    folder.fits.mkdir(exist_ok=True)
    for stale in folder.fits.glob("*.json"):
        if stale.stem not in fits:
            stale.unlink()
    for name, result in fits.items():
        result.save(folder.fits / f"{name}.json")
    return Collected(
        study, points, records, fits, warnings, _outcomes(folder, {run.name for run in runs}, points, records)
    )


def _read(folder: Path, whole: bool) -> Condensed | None:
    """A run's point and record; None if it has no header yet."""
    if not whole:
        return read_condensed(folder)
    record = read_record(folder / RECORD) if (folder / RECORD).is_file() else Record()
    return replace(condense(record), record=record) if record.headers else None


def _outcomes(
    folder: StudyFolder, names: Collection[str], points: Sequence[Point], records: Mapping[str, Record]
) -> list[Outcome]:
    """What the register says of the runs ``names``, beside what was measured; written as a table too."""
    # Parts of a study share a folder and its register: each reports on its own runs.
    entries = [entry for entry in Register(folder.predictions).read() if entry.prediction.run in names]
    if not entries:
        folder.outcomes.unlink(missing_ok=True)
        return []
    statuses = {name: read_status(folder.run(name)) for name in records}
    ended = {name: status.updated for name, status in statuses.items() if status is not None and status.state == "done"}
    hashes = {name: record.headers[-1]["scientific_hash"] for name, record in records.items()}
    found = outcomes(entries, points, hashes, ended)
    write_outcomes(folder.outcomes, found)
    return found


def provenance(collected: Collected) -> dict[str, str]:
    """What the points rest on: versions, data, and the rules that the study file states."""
    headers = [record.headers[-1] for record in collected.records.values()]

    def distinct(key: str) -> str:
        return ", ".join(sorted({str(header[key]) for header in headers}))

    study = collected.study
    return {
        "study": study.name,
        "code": distinct("code_version"),
        "data": distinct("data_hash"),
        "tokenizer": distinct("tokenizer_hash"),
        "learning rate": study.lr_rule.describe() if study.lr_rule else "as each run's configuration says",
    }


def _point(folder: StudyFolder, run: PlannedRun | ImpossibleRun, read: Condensed | None) -> Point | None:
    """A run's point; None if it never started. A run that was killed, or that failed before its first line, could not
    say so in its record: whoever saw it die wrote its status.
    """
    status = read_status(folder.run(run.name))
    ended = status if status is not None and status.state in ("failed", "preempted") else None
    check = run.check if isinstance(run, PlannedRun) else ""
    if read is None:
        return Point(run.name, run.family, ended.state, ended.reason or "", check) if ended else None
    point = replace(read.point, run=run.name, family=run.family, check=check)
    if point.state == "running" and ended is not None:
        return replace(point, state=ended.state, why=ended.reason or "")
    return point


def _fits(study: StudyConfig, points: Sequence[Point]) -> tuple[dict[str, Fit], list[str]]:
    """Every fit asked for, and the power law of best losses of each family; what cannot be fitted is said."""
    fits = {
        f"power-best-{family}": result
        for family, result in best_loss_fits(profiles(points), seed_noise(points)).items()
    }
    warnings = []
    for request in study.fit:
        try:
            fits[request.name] = _fit(request, points)
        except UserError as error:
            warnings.append(f"fit {request.name} was not made: {error}")
    return fits, warnings


def _fit(request: FitRequest, points: Sequence[Point]) -> Fit:
    law = law_named(request.law, request.map or None)
    for variable, name in request.map.items():
        if variable not in law.variables:
            raise UserError(f"law {law.name} has no variable {variable}; it has {', '.join(law.variables)}")
        if name not in COLUMNS:
            raise UserError(f"{variable}={name}: no such column; there are {', '.join(sorted(COLUMNS))}")
    chosen = [mapped(point, request.map) for point in points if request.family in (None, point.family)]
    return fit_points(chosen, law, request.hold_out, BOOTSTRAP, 0, mapping=request.map)


def as_json(collected: Collected, folder: StudyFolder) -> dict[str, Any]:
    """Summary of a collection."""
    done = [point.run for point in collected.points if point.state == "done"]
    failed = [{"run": p.run, "reason": p.why} for p in collected.points if p.state == "failed"]
    return {
        "study": collected.study.name,
        "folder": str(folder.path),
        "points": str(folder.points),
        "done": len(done),
        "failed": failed,
        "fits": {name: result.as_json() for name, result in collected.fits.items()},
        "predictions": outcomes_json(collected.outcomes),
        "headlines": collected.headlines(),
        "warnings": collected.warnings,
    }
