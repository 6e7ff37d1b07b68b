"""Every key of a configuration, broken in every way that its schema forbids.

Walks the schemas beside a file that gives every key, so that a key that is added to them is broken too.
"""

import copy
import math
import pathlib
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types as bounds
import yaml
from pydantic import BaseModel

Path = tuple[str | int, ...]
MISSING = object()
# Longer than any float, and than what a message should repeat.
_HUGE = int("9" * 400)


@dataclass(frozen=True)
class Fault:
    """``value`` (or nothing: `MISSING`) where the schema wants something else; ``said`` are words of the complaint."""

    kind: str
    path: Path
    value: Any
    said: tuple[str, ...]

    @property
    def dotted(self) -> str:
        """The key as users write it."""
        return _dotted(self.path)

    def applied_to(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """A copy of ``content`` with this fault."""
        broken: Any = copy.deepcopy(dict(content))
        inner = broken
        for part in self.path[:-1]:
            inner = inner[part]
        if self.value is MISSING:
            del inner[self.path[-1]]
        else:
            inner[self.path[-1]] = self.value
        return broken


@dataclass(frozen=True)
class Key:
    """A key of a schema: where it stands, and what its value may be."""

    path: Path
    annotation: Any
    metadata: tuple[Any, ...]
    required: bool
    completed: bool  # the section gives it a value where the file does not

    @property
    def dotted(self) -> str:
        """The key as users write it."""
        return _dotted(self.path)


def keys(model: type[BaseModel], content: Mapping[str, Any], path: Path = ()) -> Iterator[Key]:
    """All keys of ``model`` and of the sections in it that ``content`` gives."""
    for name, field in model.model_fields.items():
        here = (*path, field.alias or name)
        given = here[-1] in content
        yield Key(
            here,
            field.annotation,
            tuple(field.metadata),
            required=field.is_required() and given,
            completed=field.is_required() and not given,
        )
        inner = content.get(here[-1])  # type: ignore[call-overload]
        section = next((kind for kind in _parts(field.annotation) if _is_section(kind)), None)
        if section is None or inner is None:
            continue
        if _kind(field.annotation) is dict:
            for label, entry in inner.items():
                yield from keys(section, entry, (*here, label))
        elif _kind(field.annotation) is tuple:
            for index, entry in enumerate(inner):
                yield from keys(section, entry, (*here, index))
        else:
            yield from keys(section, inner, here)


def is_whole(key: Key) -> bool:
    """Whether its value is a whole number."""
    return _kind(key.annotation) is int


def _dotted(path: Path) -> str:
    return ".".join(str(part) for part in path)


def faults(key: Key) -> Iterator[Fault]:
    """What may be wrong with one key."""
    name = str(key.path[-1])
    slip = f"{name[:-2]}{name[-1]}{name[-2]}" if len(name) > 3 and name[-1] != name[-2] else f"{name}{name[-1]}"
    yield Fault("unknown", (*key.path[:-1], slip), 1, (f"did you mean {name}?",))
    if key.required:
        yield Fault("missing", key.path, MISSING, ("required",))
    if type(None) not in _choices(key.annotation) and not key.completed:
        yield Fault("null", key.path, None, ())
    for kind, value, *said in _wrong_values(key.annotation, key.metadata):
        yield Fault(kind, key.path, value, tuple(said))


def _wrong_values(annotation: Any, metadata: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    kind, plain = _kind(annotation), _choices(annotation)[0]
    if kind is Literal:
        yield ("choice", "nonsense", "nonsense", *(repr(option) for option in get_args(plain)))
        yield "type", {"a": 1}, "{'a': 1}"
    elif kind is bool:
        yield "type", "perhaps", "'perhaps'", "boolean"
        yield "list", [True], "[True]", "boolean"
    elif kind in (int, float):
        yield "type", "many", "'many'"
        yield "unit", "4 GiB", "'4 GiB'"
        yield "list", [4], "[4]"
        yield "flag", True, "True", "number"
        yield "clock", _Clock("1:30"), "1:30", "number" if kind is float else "integer"
        for value in (math.nan, math.inf, -math.inf) + ((1.5,) if kind is int else ()):
            yield "range", value, str(value)
        if kind is int or any(isinstance(bound, bounds.Le | bounds.Lt) for bound in metadata):
            yield "huge", _HUGE, "99999"
        for bound in metadata:
            yield from _beyond(bound)
    elif kind is str:
        yield "type", {"a": 1}, "{'a': 1}", "string"
        yield "number", 5, "5"
        yield "list", ["a"], "['a']"
    elif kind is pathlib.Path:
        yield "number", 5, "5", "path"
        yield "list", ["a"], "['a']", "path"
    elif kind is tuple:
        yield "scalar", 7, "7", "list"
        yield "section", {"a": 1}, "{'a': 1}", "list"
    else:
        yield "scalar", 7, "7", "section"
        yield "list", [1], "[1]", "section"
        yield "text", "naïve ☃", "naïve ☃", "section"


class _Clock(str):
    """Written bare: YAML 1.1 would read 1:30 as ninety."""


def _beyond(bound: Any) -> Iterator[tuple[Any, ...]]:
    if isinstance(bound, bounds.Ge):
        yield "range", bound.ge - 1, str(bound.ge - 1), f"{bound.ge}"
    elif isinstance(bound, bounds.Gt):
        yield "range", bound.gt, str(bound.gt), f"{bound.gt}"
    elif isinstance(bound, bounds.Le):
        yield "range", bound.le + 1, str(bound.le + 1), f"{bound.le}"
    elif isinstance(bound, bounds.Lt):
        yield "range", bound.lt, str(bound.lt), f"{bound.lt}"
    elif isinstance(bound, bounds.MultipleOf):
        yield "range", 8 * bound.multiple_of + 1, f"{8 * bound.multiple_of + 1}", f"{bound.multiple_of}"


def _choices(annotation: Any) -> list[Any]:
    """The members of a union, annotations taken off; the first is no None."""
    if get_origin(annotation) is Annotated:
        return _choices(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        found = [choice for member in get_args(annotation) for choice in _choices(member)]
        return sorted(found, key=lambda choice: choice is type(None))
    return [annotation]


def _kind(annotation: Any) -> Any:
    """int, float, str, bool, Literal, tuple, dict, or a section."""
    choices = _choices(annotation)
    if float in choices:
        return float
    return get_origin(choices[0]) or choices[0]


def _parts(annotation: Any) -> Iterator[Any]:
    for choice in _choices(annotation):
        yield choice
        if get_origin(choice) in (dict, tuple):
            yield from get_args(choice)


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


class _Dumper(yaml.SafeDumper):
    """Writes a `_Clock` bare."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(_Clock, lambda dumper, clock: dumper.represent_scalar("tag:yaml.org,2002:int", clock))


def as_yaml(content: Any) -> str:
    """The text of a configuration file."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
