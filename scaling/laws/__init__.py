"""Scaling laws: what each one says, in a form that one fitter can fit. docs/laws.md shows how to add one."""

from collections.abc import Mapping

from ...base.errors import UserError
from .base import Array, Coefficient, Law, Reported, exponent, offset, scale
from .custom import is_custom, load_law
from .kaplan import KAPLAN
from .optima import chinchilla_optimum, granularity_optimum
from .routed import CLARK, JOINT, LEVERAGE
from .sums import CHINCHILLA, DENSE_MOE, GRANULARITY, OVERTRAINING, SPARSITY, SumOfPowers, power

__all__ = [
    "CHINCHILLA",
    "LAWS",
    "Array",
    "Coefficient",
    "Law",
    "Reported",
    "SumOfPowers",
    "chinchilla_optimum",
    "exponent",
    "granularity_optimum",
    "law_named",
    "offset",
    "power",
    "scale",
]

LAWS: dict[str, Law] = {
    law.name: law
    for law in (
        CHINCHILLA, KAPLAN, CLARK, GRANULARITY, SPARSITY, DENSE_MOE, JOINT, LEVERAGE, OVERTRAINING, power("c")
    )
}  # fmt: skip


def law_named(name: str, variables: Mapping[str, object] | None = None) -> Law:
    """The law of that name; or a user's own, named ``package.module:NAME`` or ``path/to/file.py:NAME``.

    ``power`` is a law of compute, unless ``variables`` holds no ``c`` and exactly one other variable.

    Raises:
        UserError: no such law (lists those there are), or a law of one's own that cannot be fitted (says why).
    """
    if is_custom(name):
        return load_law(name)
    if name not in LAWS:
        raise UserError(
            f"law {name!r}: unknown; the laws are {', '.join(LAWS)}, or your own as package.module:NAME or file.py:NAME"
        )
    if name == "power" and variables is not None and "c" not in variables and len(variables) == 1:
        return power(next(iter(variables)))
    return LAWS[name]
