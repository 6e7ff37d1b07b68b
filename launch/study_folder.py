"""A study on disk: ``study.yaml`` (resolved), ``runs/NAME/``, ``points.csv``, ``downstream.csv`` where runs have
downstream tasks, ``fits/``, ``report.html``; with predictions their register ``predictions.jsonl``, the fits it uses in
``predictions/``, and ``predictions.csv``."""

import contextlib
import fcntl
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from ..base.errors import UserError
from ..base.files import digest, write_atomically
from ..scaling.record import RECORD
from ..training.status import read_status
from .expansion import expand
from .planned import Expansion
from .study_config import StudyConfig, load_study

# A killed parent takes its children along within milliseconds; this is for slow machines.
_LOCK_PATIENCE = 5.0


@dataclass(frozen=True)
class StudyFolder:
    """Paths of a study."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "study.yaml"

    @property
    def points(self) -> Path:
        return self.path / "points.csv"

    @property
    def downstream(self) -> Path:
        return self.path / "downstream.csv"

    @property
    def fits(self) -> Path:
        return self.path / "fits"

    @property
    def predictions(self) -> Path:
        """The register of what was predicted before it was measured."""
        return self.path / "predictions.jsonl"

    @property
    def outcomes(self) -> Path:
        """What was predicted beside what was measured."""
        return self.path / "predictions.csv"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    def run(self, name: str) -> Path:
        return self.path / "runs" / name

    def open(self) -> tuple[StudyConfig, Expansion]:
        """The study that was started here, and its runs.

        Raises:
            UserError: no study was started here.
        """
        if not self.config.is_file():
            raise UserError(f"{self.path}: no study here (study.yaml is missing); start one with study run --out")
        study = load_study(self.config)
        return study, expand(study)

    def claim(self, study: StudyConfig, expansion: Expansion) -> None:
        """Write ``study.yaml``, once nothing in the folder contradicts the study. A study may grow.

        Raises:
            UserError: another study lives here, or a run was begun here with another configuration.
        """
        if self.config.is_file():
            other = load_study(self.config)
            if other.name != study.name:
                raise UserError(f"{self.path}: holds the study {other.name}, not {study.name}; choose another --out")
            if other.scale != study.scale:
                raise UserError(
                    f"{self.path}: holds the study at scale {other.scale:g}, not {study.scale:g}; choose another --out"
                )
        changed = [
            run.name
            for run in expansion.runs
            if recorded_hash(self.run(run.name)) not in (None, run.config.scientific_hash)
        ]
        if changed:
            raise UserError(
                f"{self.path}: {', '.join(changed[:5])}{', ...' if len(changed) > 5 else ''} "
                "began with another configuration; choose another --out, or move these run folders away"
            )
        write_atomically(self.config, yaml.safe_dump(study.model_dump(mode="json"), sort_keys=False))

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep a second ``study run`` out of the folder. Children inherit the lock and hold it as long as they live.

        Raises:
            UserError: somebody holds it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("w") as file:
            deadline = time.monotonic() + _LOCK_PATIENCE
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise UserError(f"{self.path}: another study run works in this folder; wait for it") from None
                    time.sleep(0.1)
            yield


def recorded_hash(folder: Path) -> str | None:
    """The scientific hash that a run folder's record began with; None where nothing is recorded."""
    try:
        with (folder / RECORD).open("rb") as file:
            line = file.readline()
    except FileNotFoundError:
        return None
    try:
        return str(json.loads(line)["scientific_hash"]) if line.endswith(b"\n") else None
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{folder / RECORD}: its first line is not a header; move the run folder away") from None


def state_digest(study: StudyConfig, expansion: Expansion, folder: StudyFolder) -> str:
    """Changes when what runs have written may have changed."""
    states = []
    for run in expansion.everything:
        status = read_status(folder.run(run.name))
        states.append([run.name, [status.state, status.step, status.attempt, status.updated] if status else None])
    register = folder.predictions.read_text(encoding="utf-8") if folder.predictions.is_file() else ""
    return digest([study.model_dump(mode="json"), states, register])
