"""Conditions on the columns of a points table: ``c>=1e12 and n_active>3e5``."""

import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..base.errors import UserError

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}
_COMPARISON = re.compile(r"\s*([A-Za-z_]\w*)\s*(>=|<=|==|!=|>|<)\s*(\S+)\s*")


@dataclass(frozen=True)
class Comparison:
    """One ``column operator number``."""

    column: str
    operator: str
    number: float

    def holds(self, row: Mapping[str, float]) -> bool:
        return _OPERATORS[self.operator](row[self.column], self.number)


@dataclass(frozen=True)
class Condition:
    """Comparisons that must all hold."""

    comparisons: tuple[Comparison, ...]

    @property
    def columns(self) -> set[str]:
        return {comparison.column for comparison in self.comparisons}

    def holds(self, row: Mapping[str, float]) -> bool:
        return all(comparison.holds(row) for comparison in self.comparisons)


def parse_condition(text: str) -> Condition:
    """Read a condition.

    Raises:
        UserError: the text is not comparisons of a column with a number, joined by ``and``.
    """
    return Condition(tuple(_parse_comparison(part, text) for part in re.split(r"\band\b", text)))


def _parse_comparison(part: str, text: str) -> Comparison:
    match = _COMPARISON.fullmatch(part)
    if match is not None:
        column, sign, number = match.groups()
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if not math.isnan(value):
            return Comparison(column, sign, value)
    raise UserError(
        f"condition {text!r}: {part.strip()!r} is not a comparison of a column with a number; "
        "write for example 'c>=1e12' or 'c>=1e12 and n_active>3e5'"
    )
