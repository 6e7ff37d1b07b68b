"""What a fitted law says about sizes and budgets that were not run."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..base.errors import UserError
from ..scaling.expectation import outside
from ..scaling.fit import Fit
from ..scaling.laws import CHINCHILLA


def predict_from(path: Path, compute: float | None, given: Mapping[str, float]) -> dict[str, Any]:
    """Loss at given variables, or the optimum for ``compute`` FLOPs.

    A law of compute (``c``) takes ``compute`` as its variable; a law of n and d with a closed-form optimum answers
    with the best n, d and loss.

    Raises:
        UserError: not a fit, or variables that the law does not have or lacks.
    """
    result = Fit.load(path)
    if compute is not None and given:
        raise UserError(f"give --compute or {_options(given)}, not both")
    if compute is None:
        return _at(result, given)
    if not 0 < compute < float("inf"):
        raise UserError(f"--compute ({compute}): must be positive")
    return _at(result, {"c": compute}) if result.variables == ("c",) else _optimum(result, compute)


def _options(variables: Iterable[str]) -> str:
    return " ".join(f"--{'compute' if name == 'c' else name}" for name in variables)


def _optimum(result: Fit, compute: float) -> dict[str, Any]:
    optimum = {name: vars(estimate) for name, estimate in result.optimum(compute).items()}
    point = {name: float(optimum[name]["value"]) for name in ("n", "d")}
    return {"law": result.law, "compute": compute, **optimum, "warnings": outside(result, point)}


def _at(result: Fit, given: Mapping[str, float]) -> dict[str, Any]:
    if set(given) != set(result.variables):
        optimum = ", or --compute for the best model" if result.law == CHINCHILLA.name else ""
        raise UserError(f"law {result.law}: give {_options(result.variables)}{optimum}")
    arrays = {name: np.array([value]) for name, value in given.items()}
    law = result.as_law()
    interval = result.interval(lambda values: float(law.predict(values, arrays)[0]))
    low, high = interval or (None, None)
    loss = {"value": float(result.predict(arrays)[0]), "low": low, "high": high}
    return {"law": result.law, **given, "loss": loss, "warnings": outside(result, given)}
