"""What a fit found, as a value that can be printed, saved, loaded and asked for predictions."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from ..base.errors import UserError
from ..base.files import write_atomically
from .laws import CHINCHILLA, Array, Law, chinchilla_optimum, law_named

FILE_SCHEMA = 2
PAIRS = 3  # of correlated coefficients that are named in words
LEVEL = (2.5, 97.5)  # percentiles of the bootstrap samples


@dataclass(frozen=True)
class Estimate:
    """A coefficient with its 95 % interval.

    Attributes:
        value: None if the data did not determine it (it never moved, or lies on a bound); a warning says which.
        low, high: None without bootstrap samples.
    """

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class HeldOut:
    """Prediction error on points that the fit did not see.

    Attributes:
        n: number of points.
        rmse_log: root mean square of log(prediction / loss), natural logarithm.
        max_rel: largest |prediction / loss - 1|.
    """

    n: int
    rmse_log: float
    max_rel: float


@dataclass(frozen=True)
class Criteria:
    """Information criteria of a fit, see criteria.py; smaller is better, only differences mean something.

    Attributes:
        aicc: None with too few points for its correction.
    """

    aicc: float | None
    bic: float


@dataclass(frozen=True)
class Identifiability:
    """How well the points tell coefficients apart, linearised at the optimum.

    Attributes:
        condition_number: of the derivatives of log L, each column divided by its length; None where a direction is
            exactly flat.
        correlated: pairs of coefficients with the correlation of their errors, where it exceeds 0.95 in size.
    """

    condition_number: float | None
    correlated: tuple[tuple[str, str, float], ...]

    @property
    def words(self) -> str:
        """One sentence. Correlation is no fault: a factor far from its variable goes with its exponent."""
        if self.condition_number is None:
            return "condition number infinite: the points leave a direction open"
        text = f"condition number {self.condition_number:.2g}"
        if not self.correlated:
            return text
        shown = ", ".join(f"{a} and {b} ({value:+.3f})" for a, b, value in self.correlated[:PAIRS])
        more = len(self.correlated) - PAIRS
        others = f" and {more} pairs more" if more > 0 else ""
        return f"{text}; strongly correlated, so quote them together: {shown}{others}"


@dataclass(frozen=True)
class Row:
    """A point that a law was fitted to, or that was held out.

    Attributes:
        name: of the run, or the row's number.
        residual: log(prediction / loss), natural logarithm.
    """

    name: str
    residual: float
    held: bool


@dataclass(frozen=True)
class Fit:
    """A fitted law.

    Attributes:
        law: its name.
        variables: names of its variables.
        coefficients: what may be presented as fitted.
        values: all coefficients as the optimum has them, refused ones too: predictions inside the fitted ranges
            need them.
        n_points: points that were fitted.
        rmse_log: as in `HeldOut`, on the fitted points.
        tried, agreeing: number of starts, and of those that ended at the best optimum with the same coefficients.
        ranges: smallest and largest value of each variable that was fitted.
        samples: coefficients of the bootstrap samples, [K, P] in the law's order; K may be 0.
        criteria: on the fitted points.
        rows: every point given, in order.
    """

    law: str
    variables: tuple[str, ...]
    coefficients: Mapping[str, Estimate]
    values: Mapping[str, float]
    n_points: int
    rmse_log: float
    held_out: HeldOut | None
    tried: int
    agreeing: int
    conventions: Mapping[str, str]
    warnings: tuple[str, ...]
    ranges: Mapping[str, tuple[float, float]]
    samples: Array
    criteria: Criteria
    identifiability: Identifiability
    rows: tuple[Row, ...] = ()

    def as_law(self) -> Law:
        return law_named(self.law, dict.fromkeys(self.variables))

    def predict(self, variables: Mapping[str, Array]) -> Array:
        """Loss [n] in nats a token.

        Raises:
            UserError: a variable is missing or not positive.
        """
        return self.as_law().predict(self.values, variables)

    def interval(self, quantity: Callable[[Mapping[str, float]], float]) -> tuple[float, float] | None:
        """95 % interval of a quantity computed from coefficients by name; None without bootstrap samples."""
        if not len(self.samples):
            return None
        names = self.as_law().names
        found = [quantity(dict(zip(names, map(float, sample), strict=True))) for sample in self.samples]
        with np.errstate(invalid="ignore"):  # between two infinite samples: NaN, which no caller takes for a bound
            low, high = np.percentile(found, LEVEL)
        return float(low), float(high)

    def optimum(self, compute: float) -> dict[str, Estimate]:
        """n, d and loss of the best model for ``compute`` FLOPs, with compute = 6 n d.

        Raises:
            UserError: the law has no closed-form optimum, or its exponents do not define one.
        """
        if self.law != CHINCHILLA.name:
            raise UserError(f"law {self.law}: no closed-form optimum; chinchilla has one")
        if min(self.values["alpha"], self.values["beta"]) <= 0:
            raise UserError("law chinchilla: an exponent is 0, so there is no optimum; see the fit's warnings")
        result = {}
        for name, value in chinchilla_optimum(self.values, compute).items():
            low, high = self.interval(lambda c, name=name: chinchilla_optimum(c, compute)[name]) or (None, None)  # type: ignore[misc]
            result[name] = Estimate(value, low, high)
        return result

    def as_json(self) -> dict[str, Any]:
        """The content of ``moescale fit --json``."""
        return {
            "law": self.law,
            "n_points": self.n_points,
            "coefficients": {name: vars(estimate) for name, estimate in self.coefficients.items()},
            "rmse_log": self.rmse_log,
            "held_out": vars(self.held_out) if self.held_out else None,
            "starts": {"tried": self.tried, "agreeing": self.agreeing},
            "criteria": vars(self.criteria),
            "identifiability": {
                "condition_number": self.identifiability.condition_number,
                "correlated": [list(pair) for pair in self.identifiability.correlated],
                "words": self.identifiability.words,
            },
            "conventions": dict(self.conventions),
            "warnings": list(self.warnings),
        }

    def save(self, path: Path) -> None:
        """Write ``path``: `as_json` and what predictions need besides."""
        content = {
            "schema": FILE_SCHEMA,
            **self.as_json(),
            "variables": list(self.variables),
            "values": dict(self.values),
            "ranges": {name: list(ends) for name, ends in self.ranges.items()},
            "samples": self.samples.tolist(),
            "rows": [vars(row) for row in self.rows],
        }
        write_atomically(path, json.dumps(content, indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote.

        Raises:
            UserError: no such file, or not a fit of this schema.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read as a fit: {error}") from None
        schema = content.get("schema") if isinstance(content, dict) else None
        if schema != FILE_SCHEMA:
            raise UserError(f"{path}: schema {schema}; a fit of schema {FILE_SCHEMA} is expected")
        try:
            return cls(
                law=content["law"],
                variables=tuple(content["variables"]),
                coefficients={name: Estimate(**fields) for name, fields in content["coefficients"].items()},
                values=content["values"],
                n_points=content["n_points"],
                rmse_log=content["rmse_log"],
                held_out=HeldOut(**content["held_out"]) if content["held_out"] else None,
                tried=content["starts"]["tried"],
                agreeing=content["starts"]["agreeing"],
                conventions=content["conventions"],
                warnings=tuple(content["warnings"]),
                ranges={name: (low, high) for name, (low, high) in content["ranges"].items()},
                samples=np.array(content["samples"]).reshape(-1, len(content["values"])),
                criteria=Criteria(**content["criteria"]),
                identifiability=_identifiability(content["identifiability"]),
                rows=tuple(Row(**row) for row in content["rows"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path}: not a whole fit: {type(error).__name__} {error}") from None


def _identifiability(content: Mapping[str, Any]) -> Identifiability:
    pairs = tuple((first, second, float(value)) for first, second, value in content["correlated"])
    return Identifiability(content["condition_number"], pairs)
