"""The register of predictions: what a law was expected to say, written down before the run that tests it.

A register is a file of JSON lines that only grows, on the disk when `append` returns. Each line holds the SHA-256 of
the line before it and of itself, so that a line that was changed, moved or taken out of the middle shows. Lines cut
from the end, and a register rewritten as a whole, do not show: commit the file, or keep the hash of its last line
elsewhere. Beside it, in a folder of the register's name, lie the fits that were used, named by their SHA-256.
"""

import fcntl
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..base.errors import UserError
from ..base.files import append_line, canonical_json, read_lines, write_atomically
from .expectation import Expected

SCHEMA = 1
SUFFIX = ".jsonl"
FIRST = "0" * 64  # stands where the first line's predecessor would


@dataclass(frozen=True)
class Prediction:
    """One line.

    Attributes:
        run: name of the run, or of whatever the prediction is about.
        scientific_hash: of the run's configuration; None outside a study.
        variables: of the law, as the run will have them.
        columns: of a points table, that the variables are.
        loss: expected, nats a token.
        interval: what the interval of the loss contains.
        law: its name.
        equation: of the law.
        coefficients: all that the prediction rests on, those too that the fit does not present as determined.
        fit: file that was read.
        fit_sha256: of that file's content.
        n_points: that the law was fitted to.
        conventions: of the fit.
        warnings: of the fit and of the prediction.
        code_version: of moescale.
        time: when it was registered, UTC, ISO 8601.
        steps: optimizer steps that the run's record held by then; 0: it had not begun; None: not known.
        after: registered although the loss was already measured.
    """

    run: str
    scientific_hash: str | None
    variables: Mapping[str, float]
    columns: Mapping[str, str]
    loss: Expected
    interval: str
    law: str
    equation: str
    coefficients: Mapping[str, float]
    fit: str
    fit_sha256: str
    n_points: int
    conventions: Mapping[str, str]
    warnings: tuple[str, ...]
    code_version: str
    time: str
    steps: int | None
    after: bool

    @classmethod
    def from_line(cls, line: Mapping[str, Any]) -> "Prediction":
        """Raises KeyError or TypeError where the line is not a whole prediction."""
        content = {field.name: line[field.name] for field in fields(cls)}
        return cls(**{**content, "loss": Expected(**content["loss"]), "warnings": tuple(content["warnings"])})


@dataclass(frozen=True)
class Registered:
    """A prediction as the register holds it.

    Attributes:
        hash: of its line.
        faults: why the line cannot be believed; empty: intact.
    """

    prediction: Prediction
    hash: str
    faults: tuple[str, ...]


class Register:
    """A register in a file; the folder of fits beside it has its name without ``.jsonl``.

    Raises:
        UserError: ``path`` does not end in ``.jsonl``.
    """

    def __init__(self, path: Path) -> None:
        if path.suffix != SUFFIX:
            raise UserError(f"register {path}: must be named *{SUFFIX}; the fits it rests on go beside it, into *")
        self.path = path
        self.fits = path.with_suffix("")

    def fit_file(self, sha256: str) -> Path:
        """Where the fit with that content is kept."""
        return self.fits / f"{sha256[:16]}.json"

    def append(self, prediction: Prediction, fit_content: bytes) -> str:
        """Add a line, and keep the fit that it rests on; returns the line's hash.

        Raises:
            UserError: the file holds something else than a register, or its chain is broken already.
        """
        with self._locked():
            known = self.read()
            broken = [f"line {number}: {fault}" for number, one in enumerate(known, 1) for fault in one.faults]
            if broken:
                raise UserError(f"register {self.path}: {broken[0]}; move it away and begin a new one")
            copy = self.fit_file(prediction.fit_sha256)
            if not copy.is_file():
                write_atomically(copy, fit_content)
            previous = known[-1].hash if known else FIRST
            content = {"schema": SCHEMA, "previous": previous, **asdict(prediction)}
            line_hash = _hash(content)
            append_line(self.path, {**content, "hash": line_hash})
        return line_hash

    def read(self) -> list[Registered]:
        """Every prediction, in order, with what speaks against it; none where there is no file.

        Raises:
            UserError: a line is not a prediction of this schema.
        """
        found: list[Registered] = []
        for number, line in enumerate(read_lines(self.path), start=1):
            if line.get("schema") != SCHEMA:
                raise UserError(
                    f"register {self.path}, line {number}: schema {line.get('schema')}; a prediction of schema "
                    f"{SCHEMA} is expected"
                )
            try:
                prediction = Prediction.from_line(line)
            except (KeyError, TypeError) as error:
                raise UserError(f"register {self.path}, line {number}: not a whole prediction: {error}") from None
            faults = []
            if _hash({key: value for key, value in line.items() if key != "hash"}) != line.get("hash"):
                faults.append("its content was changed after it was written")
            if line.get("previous") != (found[-1].hash if found else FIRST):
                faults.append("the line before it was changed, moved or taken out")
            found.append(Registered(prediction, str(line.get("hash")), (*faults, *self._fit_faults(prediction))))
        return found

    def _fit_faults(self, prediction: Prediction) -> Iterator[str]:
        """What is wrong with the fit kept for a prediction: its content, or what it says at the variables."""
        path = self.fit_file(prediction.fit_sha256)
        if not path.is_file():
            yield f"the fit it rests on ({path}) is missing"
        elif sha256_of(path.read_bytes()) != prediction.fit_sha256:
            yield f"the fit it rests on ({path}) was changed"
        # Not `Fit.load`: what was registered outlives the schema of fits, and a law of one's own need not run for this.
        elif json.loads(path.read_bytes())["values"] != dict(prediction.coefficients):
            yield f"its coefficients are not those of its fit ({path})"

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Two writers at once would both follow the same line."""
        self.fits.mkdir(parents=True, exist_ok=True)
        with (self.fits / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def sha256_of(content: bytes) -> str:
    """In 64 hex digits."""
    return hashlib.sha256(content).hexdigest()


def _hash(content: Mapping[str, Any]) -> str:
    """Of a line without its own hash; through JSON, so that a line as written and as read back agree."""
    return sha256_of(canonical_json(json.loads(json.dumps(content))).encode())
