"""Dotted keys of a run's content (``training.flops``), and rules that match by them."""

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ..base.complaints import brief
from ..base.errors import UserError

Content = Mapping[str, Any]
_LONGEST = 60  # characters of a text that is shown whole


def nested(key: str, value: Any) -> dict[str, Any]:
    """``{"a": {"b": value}}`` for the key ``a.b``."""
    for part in reversed(key.split(".")):
        value = {part: value}
    assert isinstance(value, dict)
    return value


def value_at(content: Content, key: str) -> Any:
    """The value under a dotted key; None where it is not given."""
    value: Any = content
    for part in key.split("."):
        if not isinstance(value, Mapping):
            return None
        value = value.get(part)
    return value


def keys_in(content: Content, prefix: str = "") -> Iterator[str]:
    """All dotted keys that ``content`` gives a value, sections included."""
    for key, value in content.items():
        yield f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from keys_in(value, f"{prefix}{key}.")


def matches(rule: Mapping[str, Any], content: Content) -> bool:
    """Whether every key of ``rule`` has the rule's value, or one of its list of values."""
    return all(_allowed(value_at(content, key), wanted) for key, wanted in rule.items())


def _allowed(value: Any, wanted: Any) -> bool:
    return _equal(value, wanted) or (isinstance(wanted, list) and any(_equal(value, one) for one in wanted))


def _equal(value: Any, wanted: Any) -> bool:
    return bool(value == wanted) and isinstance(value, bool) == isinstance(wanted, bool)


def check_rule(where: str, rule: Mapping[str, Any], contents: Iterable[Content]) -> None:
    """Refuse a rule that speaks of a key which none of ``contents`` gives, or that matches none of them.

    Raises:
        UserError: names near keys, or the values that the rule's keys do have.
    """
    contents = list(contents)
    given = sorted({key for content in contents for key in keys_in(content)})
    for key in rule:
        if key not in given:
            near = difflib.get_close_matches(key, given, n=3)
            raise UserError(
                f"{where}: {key} is neither swept nor set" + (f"; did you mean {' or '.join(near)}?" if near else "")
            )
    if not any(matches(rule, content) for content in contents):
        raise UserError(f"{where}: {shown(rule)} matches no combination; {_values_of(rule, contents)}")


def number(value: float) -> str:
    """The shortest text that reads back as ``value``: 1e12, 0.01, 256."""
    if not math.isfinite(value):
        return str(value)
    shortest = next(text for digits in range(1, 18) if float(text := f"{value:.{digits}g}") == value)
    mantissa, separator, exponent = shortest.partition("e")
    return f"{mantissa}e{int(exponent)}" if separator else mantissa


def shown(values: Mapping[str, Any]) -> str:
    """Keys and their values, for messages."""
    return ", ".join(f"{key}={_shown(value)}" for key, value in values.items())


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return number(value)
    return value if isinstance(value, str) and len(value) <= _LONGEST else brief(value)


def _values_of(rule: Mapping[str, Any], contents: Sequence[Content]) -> str:
    found = []
    for key in rule:
        values = list(dict.fromkeys(_shown(value_at(content, key)) for content in contents))
        found.append(f"{key} is {', '.join(values[:8])}{', ...' if len(values) > 8 else ''}")
    return "; ".join(found)
