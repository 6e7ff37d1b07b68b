"""From run folders to points, fits and a report."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from ..base.errors import UserError
from ..models.counts import CONVENTIONS
from ..scaling.fit import Fit, fit
from ..scaling.isoflop import Comparison, Profile, best_loss_fits, compare, profiles, seed_noise
from ..scaling.laws import Law, law_named
from ..scaling.points import Point, point_from_record, variables_of, write_points
from ..scaling.record import RECORD, Record, read_record
from ..training.status import read_status
from .condition import parse_condition
from .expansion import PlannedRun
from .study_config import FitRequest, StudyConfig
from .study_folder import StudyFolder

BOOTSTRAP = 400  # resamplings behind an interval
DENSE = "dense"  # the family that others are compared with


@dataclass(frozen=True)
class Collected:
    """What a study has shown so far. ``warnings`` are about fits that could not be made."""

    study: StudyConfig
    points: list[Point]
    records: dict[str, Record]
    fits: dict[str, Fit]
    warnings: list[str]

    def headlines(self) -> list[str]:
        """The main results, a line each."""
        found = profiles(self.points)
        noise = seed_noise(self.points)
        laws = best_loss_fits(found)
        lines = [_profile_line(budget, [p for p in found if p.budget == budget]) for budget in _budgets(found)]
        lines += [_comparison_line(comparison) for comparison in compare(found, laws, noise, DENSE)]
        if noise is not None:
            lines.append(f"seed noise: standard deviation {noise.sd:.3f} nats ({noise.freedom} degrees of freedom)")
        return lines


def collect(folder: StudyFolder) -> Collected:
    """Read all runs of the study in ``folder``; write ``points.csv`` and ``fits/``.

    Raises:
        UserError: no study there, no run of it has started, or a record is damaged.
    """
    study, runs = folder.open()
    records = {run.name: read_record(folder.run(run.name)) for run in runs if _started(folder, run)}
    if not any(record.headers for record in records.values()):
        raise UserError(f"{folder.path}: no run of the study {study.name} has started yet; start them with study run")
    points = [
        _point(folder, run, records[run.name]) for run in runs if run.name in records and records[run.name].headers
    ]
    write_points(folder.points, points)
    fits, warnings = _fits(study, points)
    folder.fits.mkdir(exist_ok=True)
    for stale in folder.fits.glob("*.json"):
        if stale.stem not in fits:
            stale.unlink()
    for name, result in fits.items():
        result.save(folder.fits / f"{name}.json")
    return Collected(study, points, records, fits, warnings)


def provenance(collected: Collected) -> dict[str, str]:
    """What the points rest on: conventions, versions, data, and the rules that the study file states."""
    headers = [record.headers[-1] for record in collected.records.values() if record.headers]

    def distinct(key: str) -> str:
        return ", ".join(sorted({str(header[key]) for header in headers}))

    study = collected.study
    stated = {
        "study": study.name,
        "code": distinct("code_version"),
        "data": distinct("data_hash"),
        "tokenizer": distinct("tokenizer_hash"),
        "learning rate": study.lr_rule.describe() if study.lr_rule else "as each run's configuration says",
    }
    return stated | {f"convention: {name}": text for name, text in CONVENTIONS.items()}


def _started(folder: StudyFolder, run: PlannedRun) -> bool:
    return (folder.run(run.name) / RECORD).is_file()


def _point(folder: StudyFolder, run: PlannedRun, record: Record) -> Point:
    point = point_from_record(record, run.name, run.family)
    status = read_status(folder.run(run.name))
    if point.state == "running" and status is not None and status.state in ("failed", "preempted"):
        # A run that was killed could not end its record; whoever saw it die wrote the status.
        return replace(point, state=status.state, why=status.reason or "")
    return point


def _fits(study: StudyConfig, points: Sequence[Point]) -> tuple[dict[str, Fit], list[str]]:
    """Every fit asked for, and the power law of best losses of each family; what cannot be fitted is said."""
    fits = {f"power-best-{family}": result for family, result in best_loss_fits(profiles(points)).items()}
    warnings = []
    for request in study.fit:
        try:
            fits[request.name] = _fit(request, points)
        except UserError as error:
            warnings.append(f"fit {request.name} was not made: {error}")
    return fits, warnings


def _fit(request: FitRequest, points: Sequence[Point]) -> Fit:
    law = law_named(request.law, request.map or None)
    known = {field.name for field in fields(Point)}
    for variable, name in request.map.items():
        if variable not in law.variables:
            raise UserError(f"law {law.name} has no variable {variable}; it has {', '.join(law.variables)}")
        if name not in known:
            raise UserError(f"{variable}={name}: no such column; there are {', '.join(sorted(known))}")
    chosen = [
        replace(point, **{variable: getattr(point, name) for variable, name in request.map.items()})
        for point in points
        if request.family in (None, point.family)
    ]
    return fit_points(chosen, law, request.hold_out, BOOTSTRAP, 0)


def fit_points(points: Sequence[Point], law: Law, hold_out: str | None, bootstrap: int, seed: int) -> Fit:
    """Fit ``law`` to the finished points.

    Args:
        hold_out: condition on columns of the points; those for which it holds are predicted, not fitted.

    Raises:
        UserError: a point lacks a variable, or there are too few points.
    """
    variables, loss, used = variables_of(points, law)
    held = _held_out(hold_out, used) if hold_out is not None else None
    return fit(law, variables, loss, hold_out=held, bootstrap=bootstrap, seed=seed)


def _held_out(condition: str, points: Sequence[Point]) -> np.ndarray:
    """Which points the condition holds for."""
    parsed = parse_condition(condition)
    for name in sorted(parsed.columns):
        for point in points:
            if not isinstance(getattr(point, name, None), int | float):
                raise UserError(f"condition {condition!r}: run {point.run} has no number in column {name}")
    return np.array([parsed.holds({name: getattr(point, name) for name in parsed.columns}) for point in points])


def _budgets(found: Sequence[Profile]) -> list[float]:
    return sorted({profile.budget for profile in found})


def _profile_line(budget: float, found: Sequence[Profile]) -> str:
    best = [f"{p.family} {p.loss_best:.3f}{'' if p.interior else '*'}" for p in found]
    edge = "" if all(p.interior for p in found) else "   (* not bracketed by sizes)"
    return f"best loss at {budget:.1e} FLOPs: {', '.join(best)}{edge}"


def _comparison_line(comparison: Comparison) -> str:
    line = f"{comparison.family} against {DENSE} at {comparison.budget:.1e} FLOPs: {comparison.gap:+.3f} nats"
    if comparison.resolved is False:
        return f"{line}, unresolved (within seed noise)"
    if comparison.multiple is not None:
        line += f", worth {comparison.multiple:.2f} x the compute"
        if comparison.low is not None and comparison.high is not None:
            line += f" ({comparison.low:.2f} to {comparison.high:.2f})"
        line += ", extrapolated" if comparison.extrapolated else ""
    return line


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
        "headlines": collected.headlines(),
        "warnings": collected.warnings,
    }
