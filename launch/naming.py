"""Names of runs: a function of the run and of its group's axes alone, so that nothing added elsewhere renames a run."""

import re
from collections.abc import Iterable
from typing import Any

from ..base.files import digest
from .run_keys import Content, number, value_at
from .study_config import GroupConfig, keys_of

# Always part of a run's name, so that a new axis in one group renames no run of another.
_ALWAYS_NAMED = ("model.shape", "training.flops", "training.tokens", "training.steps", "training.seed")
_LARGEST = 10**100  # whole numbers beyond this are in no run
_SHORT = {
    "optimizer.lr": "lr",
    "training.batch": "b",
    "moe.experts": "E",
    "moe.active": "K",
    "moe.granularity": "G",
    "moe.sparsity": "S",
}


def run_name(family: str, keys: Iterable[str], content: Content) -> str:
    """Family, size, budget, the values of ``keys``, seed. ``content`` is a run file's; it need not be valid."""
    named = [_SHORT.get(key, key) + _text(value_at(content, key)) for key in sorted({*keys} - set(_ALWAYS_NAMED))]
    seed = value_at(content, "training.seed")
    return "-".join([family, _size(content), _budget(content), *named, f"s{_text(0 if seed is None else seed)}"])


def naming_keys(group: GroupConfig) -> list[str]:
    """Swept keys that tell the runs of a group apart: of keys that move together the first ones that do."""
    named: list[str] = []
    for axis, values in group.grid.items():
        keys = keys_of(axis)
        rows = [value if len(keys) > 1 else [value] for value in values]
        enough = next((n for n in range(1, len(keys)) if len({repr(row[:n]) for row in rows}) == len(rows)), len(keys))
        named += keys[:enough]
    return named


def _size(content: Content) -> str:
    shape = value_at(content, "model.shape")
    if shape is not None:
        return _text(shape)
    return f"w{_text(value_at(content, 'model.width'))}L{_text(value_at(content, 'model.layers'))}"


def _budget(content: Content) -> str:
    for key, unit in (("training.flops", ""), ("training.tokens", "tok")):
        amount = value_at(content, key)
        if amount is not None:
            return _text(float(amount) if isinstance(amount, int) and abs(amount) < _LARGEST else amount) + unit
    return f"{_text(value_at(content, 'training.steps'))}steps"


def _text(value: Any) -> str:
    """A value as part of a file name."""
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, float):
        return number(value)
    if isinstance(value, int) and abs(value) < _LARGEST:
        return str(value)
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9._+]+", value):
        return value
    try:
        return digest(value)[:8]
    except (TypeError, ValueError):  # a date, a NaN: no run can have it, but the plan lists it
        return digest(repr(value))[:8]
