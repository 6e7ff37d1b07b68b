"""Numbers for people."""

import math
from collections.abc import Sequence

from .fitted import Estimate

NONE = "\N{EN DASH}"
_PREFIXES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def count(value: float | None) -> str:
    """Parameters or tokens: 1.2M."""
    if value is None:
        return NONE
    for size, prefix in _PREFIXES:
        if abs(value) >= 0.9995 * size:
            return f"{value / size:.3g}{prefix}"
    return f"{value:.3g}"


def significant_count(value: float | None) -> str:
    """A count that is known to two digits at best: 6.3k."""
    return NONE if value is None else count(float(f"{value:.2g}"))


def fixed(value: float | None, digits: int = 3) -> str:
    """A fixed number of decimals."""
    return NONE if value is None else f"{value:.{digits}f}"


def significant(value: float | None, digits: int = 3) -> str:
    """A number of significant digits: 200, 0.043, 1.9e17."""
    return NONE if value is None else f"{float(f'{value:.{digits}g}'):g}".replace("e+", "e")


def flops(value: float | None) -> str:
    """FLOPs: 3.0e11."""
    return NONE if value is None else f"{value:.1e}".replace("e+", "e")


def decimals(error: float | None, default: int = 3) -> int:
    """Decimals that an uncertainty leaves a number: those that show two digits of the uncertainty, at most four."""
    if error is None or not math.isfinite(error) or error <= 0:
        return default
    return min(max(_place(error), 0), 4)


def with_error(value: float, reach: float | None, default: int = 3) -> str:
    """``+0.038 ± 0.012``."""
    if reach is None:
        return f"{value:+.{default}f}"
    digits = decimals(reach)
    return f"{value:+.{digits}f} ± {reach:.{digits}f}"


def digits_of(value: Estimate, default: int = 3) -> int:
    """Significant digits that the interval of an estimate leaves it, one to four."""
    if value.value is None or value.low is None or value.high is None:
        return default
    half = (value.high - value.low) / 2
    if not math.isfinite(half) or half <= 0 or value.value == 0:
        return 4 if half == 0 else 1
    return min(max(math.floor(math.log10(abs(value.value))) + _place(half) + 1, 1), 4)


def _place(error: float) -> int:
    """The decimal of an uncertainty's second digit; negative from 100 on."""
    return 1 - math.floor(math.log10(error))


def interval(low: float | None, high: float | None, digits: int = 2) -> str:
    """``0.071 to 0.079``, or nothing."""
    return "" if low is None or high is None else f"{significant(low, digits)} to {significant(high, digits)}"


def ends(value: Estimate) -> str:
    """The interval of an estimate with the digits that it supports, or nothing."""
    return interval(value.low, value.high, max(digits_of(value), 2))


def estimate(value: Estimate) -> str:
    """``0.075 (0.071 to 0.079)``, with the digits that the interval supports."""
    if value.value is None:
        return "not determined"
    return significant(value.value, digits_of(value)) + (f" ({ends(value)})" if value.low is not None else "")


def percent(share: float | None) -> str:
    """``15 %``."""
    return NONE if share is None else f"{100 * share:.0f} %"


def percents(low: float | None, high: float | None) -> str:
    """``-40 to 23 %``, or nothing."""
    return "" if low is None or high is None else f"{100 * low:.0f} to {100 * high:.0f} %"


def plural(number: int, noun: str) -> str:
    """``1 run``, ``2 runs``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def listed(names: Sequence[str]) -> str:
    """``a, b and c``."""
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)
