"""Numbers for people."""

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


def fixed(value: float | None, digits: int = 3) -> str:
    """A fixed number of decimals."""
    return NONE if value is None else f"{value:.{digits}f}"


def significant(value: float | None, digits: int = 3) -> str:
    """A number of significant digits."""
    return NONE if value is None else f"{value:.{digits}g}"


def flops(value: float | None) -> str:
    """FLOPs: 3.0e11."""
    return NONE if value is None else f"{value:.1e}".replace("e+", "e")


def interval(low: float | None, high: float | None, digits: int = 3) -> str:
    """``0.071 to 0.079``, or nothing."""
    return "" if low is None or high is None else f"{low:.{digits}g} to {high:.{digits}g}"


def estimate(value: Estimate, digits: int = 3) -> str:
    """``0.075 (0.071 to 0.079)``."""
    if value.value is None:
        return "not determined"
    ends = interval(value.low, value.high, digits)
    return significant(value.value, digits) + (f" ({ends})" if ends else "")


def listed(names: Sequence[str]) -> str:
    """``a, b and c``."""
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)
