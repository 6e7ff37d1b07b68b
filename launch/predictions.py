"""Registering what a fitted law expects of runs that are still to be trained."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..base.errors import UserError
from ..scaling.expectation import expect
from ..scaling.fit import Fit
from ..scaling.points import COLUMNS, Point, column, mapped, point_from_record, read_points
from ..scaling.record import RECORD, read_record
from ..scaling.register import Prediction, Register, sha256_of
from ..scaling.seeds import seed_noise
from ..version import __version__
from .fitting import COLUMN
from .held_out import point_of
from .plan import plan_study
from .planned import Expansion
from .study_config import FitRequest, StudyConfig
from .study_folder import StudyFolder


@dataclass(frozen=True)
class Entry:
    """A prediction that was registered, and where."""

    prediction: Prediction
    hash: str
    register: Path

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self.prediction), "hash": self.hash, "register": str(self.register)}


@dataclass(frozen=True)
class _Source:
    """A fit with the bytes it was read from."""

    path: Path
    content: bytes
    fit: Fit

    @classmethod
    def read(cls, path: Path) -> "_Source":
        fit = Fit.load(path)
        return cls(path, path.read_bytes(), fit)

    def prediction(self, run: str, variables: Mapping[str, float], seed_sd: float | None) -> Prediction:
        """What the fit says at ``variables``, as nobody has registered it yet."""
        found = expect(self.fit, variables, seed_sd)
        return Prediction(
            run=run,
            scientific_hash=None,
            variables=dict(variables),
            columns={},
            loss=found.loss,
            interval=found.holds,
            law=self.fit.law,
            equation=str(self.fit.conventions["equation"]),
            coefficients=dict(self.fit.values),
            fit=str(self.path),
            fit_sha256=sha256_of(self.content),
            n_points=self.fit.n_points,
            conventions=dict(self.fit.conventions),
            warnings=(*self.fit.warnings, *found.warnings),
            code_version=__version__,
            time=datetime.now(UTC).isoformat(timespec="seconds"),
            steps=None,
            after=False,
        )

    @property
    def columns(self) -> dict[str, str]:
        """Column of a points table that each variable of the law was fitted to."""
        law = self.fit.as_law()
        by_law = {"n": law.n_counts} if law.n_counts else {}
        return {
            name: str(self.fit.conventions.get(COLUMN.format(name), by_law.get(name, name)))
            for name in self.fit.variables
        }


def register_values(file: Path, given: Mapping[str, float], name: str, register: Path) -> Entry:
    """Register what the fit in ``file`` says at given variables, under ``name``.

    Raises:
        UserError: not a fit, other variables than the law has, a fit without resamplings, or a broken register.
    """
    source = _Source.read(file)
    if set(given) != set(source.fit.variables):
        options = " ".join(f"--{'compute' if v == 'c' else v}" for v in source.fit.variables)
        raise UserError(f"law {source.fit.law}: give {options} to register a prediction")
    return _append(source, source.prediction(name, given, None), Register(register))


def register_runs(
    file: Path, directory: Path, names: Sequence[str], after: bool, register: Path | None = None
) -> list[Entry]:
    """Register what the fit in ``file`` says of runs of the study in ``directory``: all of them, or none.

    Seed noise comes from the study's ``points.csv``, where that is there.

    Args:
        after: register runs whose loss is known too; their lines say so.
        register: default: the study's own.

    Raises:
        UserError: no such run, a run with a measured loss, not a fit, or a broken register.
    """
    folder = StudyFolder(directory)
    study, expansion = folder.open()
    points = read_points(folder.points) if folder.points.is_file() else []
    return register_expected(file, folder, study, expansion, names, points, after=after, register=register)


def register_expected(
    file: Path,
    folder: StudyFolder,
    study: StudyConfig,
    expansion: Expansion,
    names: Sequence[str],
    points: Sequence[Point],
    *,
    after: bool = False,
    register: Path | None = None,
) -> list[Entry]:
    """`register_runs` for a study that is already open; ``points`` tell its seed noise."""
    source = _Source.read(file)
    runs = {run.name: run for run in expansion.runs}
    rows = {row.name: row for row in plan_study(study, expansion).rows}
    for name in names:
        if name not in rows:
            near = difflib.get_close_matches(name, rows, n=3)
            raise UserError(
                f"--for {name}: no run of the study in {folder.path} has this name"
                + (f"; did you mean {' or '.join(near)}?" if near else "")
            )
    for variable, name in source.columns.items():
        if name not in COLUMNS:
            raise UserError(f"{file}: {variable} was fitted to column {name}, which runs of a study do not have")
    noise = seed_noise(points)
    predictions = []
    for name in names:
        steps, measured = _progress(folder, name)
        if measured is not None and not after:
            raise UserError(
                f"--for {name}: its loss is known already ({measured:.4f} nats/token), so nothing can be predicted; "
                "--after registers it all the same and says so"
            )
        planned = point_of(runs[name], rows[name])
        law, columns = source.fit.as_law(), source.columns
        point = mapped(planned, columns)
        variables = {variable: float(column([point], law, variable)[0]) for variable in law.variables}
        seed_sd = noise.of(planned.family)[1].sd if noise else None
        predictions.append(
            replace(
                source.prediction(name, variables, seed_sd),
                scientific_hash=runs[name].config.scientific_hash,
                columns=columns,
                steps=steps,
                after=measured is not None,
            )
        )
    target = Register(register if register is not None else folder.predictions)
    return [_append(source, prediction, target) for prediction in predictions]


def register_missing(
    folder: StudyFolder,
    study: StudyConfig,
    expansion: Expansion,
    wanted: Mapping[str, Sequence[FitRequest]],
    points: Sequence[Point],
) -> list[Entry]:
    """Register what fits expect of runs, but for what the register has already from an earlier start."""
    known = {(one.prediction.run, Path(one.prediction.fit).stem) for one in Register(folder.predictions).read()}
    entries = []
    for request in study.fit:
        names = [name for name, own in wanted.items() if request in own and (name, request.name) not in known]
        file = folder.fits / f"{request.name}.json"
        if names:
            entries += register_expected(file, folder, study, expansion, names, points)
    return entries


def _append(source: _Source, prediction: Prediction, register: Register) -> Entry:
    return Entry(prediction, register.append(prediction, source.content), register.path)


def _progress(folder: StudyFolder, name: str) -> tuple[int, float | None]:
    """Steps that a run's record holds, and its final loss, if there is one."""
    if not (folder.run(name) / RECORD).is_file():
        return 0, None
    record = read_record(folder.run(name))
    return record.last_step, point_from_record(record, name, "").loss if record.headers else None
