"""Laws from outside the package: found by name, and checked before anything is fitted with them."""

import importlib
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np

from ...base.errors import UserError
from .base import Array, Law
from .sums import SumOfPowers

ROWS = 8  # of the table that a law is tried on
STEP = 1e-5  # of the difference quotients
CLOSE = 1e-4  # relative, between them and the law's own derivative


def is_custom(name: str) -> bool:
    """Whether ``name`` is of the form ``package.module:NAME`` or ``path/to/file.py:NAME``."""
    return ":" in name


def load_law(name: str) -> Law:
    """Import a law and check it. Its ``name`` becomes the one it was found by, so that a saved fit finds it again.

    Importing runs the module, as any import does. A file's path is made absolute.

    Raises:
        UserError: no such file, module or attribute, the module fails, or the law cannot be fitted; says which.
    """
    place, _, attribute = name.rpartition(":")
    if not place or not attribute.isidentifier():
        raise UserError(f"law {name!r}: give package.module:NAME or path/to/file.py:NAME")
    module = _module(place, name)
    if not hasattr(module, attribute):
        found = [key for key, value in vars(module).items() if isinstance(value, Law)]
        raise UserError(f"law {name}: {place} has no {attribute}; its laws are {', '.join(found) or 'none'}")
    law = getattr(module, attribute)
    if not isinstance(law, Law):
        raise UserError(
            f"law {name}: {attribute} is a {type(law).__name__}, not a Law; make one with moescale.scaling.laws"
        )
    check(law)
    is_file = place.endswith(".py")
    return replace(law, name=f"{Path(place).resolve()}:{attribute}" if is_file else name)


def _module(place: str, name: str) -> ModuleType:
    try:
        if not place.endswith(".py"):
            return importlib.import_module(place)
        path = Path(place).resolve()
        if not path.is_file():
            raise UserError(f"law {name}: no file {path}")
        key = f"moescale_law_{abs(hash(path))}"  # dataclasses look their module up
        spec = importlib.util.spec_from_file_location(key, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[key] = module
        spec.loader.exec_module(module)
        return module
    except UserError as error:
        raise UserError(f"law {name}: {error}" if not str(error).startswith("law ") else str(error)) from None
    except Exception as error:
        raise UserError(f"law {name}: {place} cannot be imported: {type(error).__name__}: {error}") from None


def check(law: Law) -> None:
    """Refuse a law that the fitter could not fit.

    Raises:
        UserError: names the law, the fault and what to change.
    """
    if len(set(law.names)) != len(law.names):
        raise UserError(f"law {law.name}: two coefficients have the same name: {', '.join(law.names)}")
    if isinstance(law, SumOfPowers):
        _check_terms(law)
    for coefficient in law.coefficients:
        lowest = 0.0 if coefficient.kind == "scale" else -np.inf
        if not lowest <= coefficient.low < coefficient.high or (coefficient.kind == "scale" and coefficient.low <= 0):
            raise UserError(
                f"law {law.name}: coefficient {coefficient.name} has bounds {coefficient.low:g} to "
                f"{coefficient.high:g}; the first must be smaller" + (" and positive" if lowest == 0 else "")
            )
    try:
        logs = law.logs_of(_table(law))
        starts = law.starts(logs, np.linspace(2.0, 4.0, ROWS))
        _check_starts(law, starts)
        _check_derivative(law, starts, logs)
    except (TypeError, ValueError, KeyError, IndexError, np.linalg.LinAlgError) as error:
        raise UserError(
            f"law {law.name}: it fails on a table of {ROWS} rows: {type(error).__name__}: {error}"
        ) from None


def _table(law: Law) -> dict[str, Array]:
    """Values of the usual sizes, in no particular pattern."""
    rng = np.random.default_rng(0)
    ranges = {"s": (0.0, 0.95), "e": (1.0, 64.0), "k": (1.0, 8.0), "g": (1.0, 16.0)}
    return {
        name: rng.uniform(*ranges[name], ROWS) if name in ranges else np.exp(rng.uniform(15.0, 21.0, ROWS))
        for name in law.variables
    }


def _check_terms(law: SumOfPowers) -> None:
    used = {*law.terms, *(name for powers in law.terms.values() for name in powers)}
    if missing := sorted(used - set(law.names)):
        raise UserError(f"law {law.name}: its terms name {', '.join(missing)}, which is no coefficient of it")
    if idle := sorted(set(law.names) - used):
        raise UserError(f"law {law.name}: coefficient {', '.join(idle)} stands in none of its terms")
    for coefficient in law.coefficients:
        if (coefficient.kind == "scale") != (coefficient.name in law.terms):
            raise UserError(
                f"law {law.name}: {coefficient.name} is a {coefficient.kind}; the keys of terms are scales, and the "
                "names within a term are exponents"
            )
        if coefficient.kind == "exponent" and not coefficient.starts:
            raise UserError(f"law {law.name}: exponent {coefficient.name} has no values to start from")
    known = law.logs_of(_table(law))
    if unknown := sorted({v for powers in law.terms.values() for v in powers.values()} - set(known)):
        raise UserError(f"law {law.name}: its terms use {', '.join(unknown)}; its variables are {', '.join(known)}")


def _check_starts(law: Law, starts: Array) -> None:
    low, high = law.bounds
    wanted = len(law.coefficients)
    if starts.ndim != 2 or starts.shape[1] != wanted or not len(starts):
        raise UserError(f"law {law.name}: starts has shape {starts.shape}; [S, {wanted}] is needed, with S >= 1")
    if not (np.isfinite(starts).all() and (starts >= low).all() and (starts <= high).all()):
        raise UserError(f"law {law.name}: a start is not finite or not within the bounds of its coefficients")


def _check_derivative(law: Law, starts: Array, logs: dict[str, Array]) -> None:
    low, high = law.bounds
    theta = np.clip(starts[:4], low + 2 * STEP, high - 2 * STEP)
    value, derivative = law.evaluate(theta, logs)
    if value.shape != (len(theta), ROWS) or derivative.shape != (len(theta), ROWS, len(low)):
        raise UserError(
            f"law {law.name}: evaluate gives shapes {value.shape} and {derivative.shape}; "
            f"{(len(theta), ROWS)} and {(len(theta), ROWS, len(low))} are needed"
        )
    if not (np.isfinite(value).all() and np.isfinite(derivative).all()):
        raise UserError(f"law {law.name}: evaluate gives values that are not finite at its own starts")
    for place, name in enumerate(law.names):
        shift = np.zeros(len(low))
        shift[place] = STEP
        numerical = (law.evaluate(theta + shift, logs)[0] - law.evaluate(theta - shift, logs)[0]) / (2 * STEP)
        size = np.abs(numerical).max() + 1e-6
        if np.abs(numerical - derivative[..., place]).max() > CLOSE * size:
            raise UserError(
                f"law {law.name}: the derivative of log L by {name} that evaluate gives differs from the difference "
                "quotient" + (" (scales are fitted as logarithms)" if law.coefficients[place].kind == "scale" else "")
            )
