"""What is wrong with a configuration, a line for each key: where it stands, what it says, what is expected."""

import difflib
import reprlib
import sys
import types
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel

_PLAIN = {
    "model_type": "a section of keys with values is expected",
    "dict_type": "a section of keys with values is expected",
    "tuple_type": "a list is expected",
    "list_type": "a list is expected",
    "path_type": "a path is expected",
}
_LARGEST = 2**63 - 1

_brief = reprlib.Repr()
_brief.maxstring = _brief.maxother = _brief.maxlong = 60
_brief.maxlevel = 3


def brief(value: Any) -> str:
    """``value`` as Python writes it, cut to what a message can hold."""
    return _brief.repr(value)


def explain(model: type[BaseModel], problem: Any) -> str:
    """One of pydantic's complaints about ``model``, as a line for the user."""
    location, _ = _follow(model, problem["loc"])
    field = ".".join(location)
    if problem["type"] == "extra_forbidden":
        return f"{field}: unknown key; {_advice(location[-1], _names(_follow(model, problem['loc'][:-1])[1]))}"
    if problem["type"] == "missing":
        return f"{field}: required and not given"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":  # our own checks name fields themselves, but not the entry of a list or dict
        return message if field in message else f"{field}: {message}"
    message = _PLAIN.get(problem["type"], f"{message[0].lower()}{message[1:]}")
    return f"{field} ({brief(problem['input'])}): {message}"


def wrong_numbers(annotation: Any, given: Any, path: tuple[str, ...] = ()) -> Iterator[str]:
    """What pydantic would take for numbers and nobody means as one: true and false, and more than 64 bits hold."""
    if isinstance(given, Mapping):
        for key, value in given.items():
            yield from wrong_numbers(_inside(annotation, key), value, (*path, str(key)))
    elif isinstance(given, list):
        for index, value in enumerate(given):
            yield from wrong_numbers(_inside(annotation, index), value, (*path, str(index)))
    elif isinstance(given, int):
        kinds = _choices(annotation)
        field = ".".join(path)
        if isinstance(given, bool):
            if (int in kinds or float in kinds) and bool not in kinds:
                yield f"{field} ({given}): a number is expected, not true or false"
        elif float in kinds:
            if abs(given) > sys.float_info.max:
                yield f"{field} ({brief(given)}): too large; numbers go up to 1e308"
        elif int in kinds and abs(given) > _LARGEST:
            yield f"{field} ({brief(given)}): too large; whole numbers go up to 2^63 - 1"


def _advice(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"


def _names(annotation: Any) -> list[str]:
    """Keys of a section."""
    return [field.alias or name for kind in _sections(annotation) for name, field in kind.model_fields.items()]


def _follow(annotation: Any, location: tuple[Any, ...]) -> tuple[list[str], Any]:
    """The keys of a location as users write them, and what stands there: pydantic adds names of types to keys."""
    keys = []
    for part in location:
        inner = _inside(annotation, part)
        if inner is None and not _sections(annotation):
            break
        keys.append(str(part))
        annotation = inner
    return keys, annotation


def _inside(annotation: Any, key: Any) -> Any:
    """The annotation of what stands under ``key`` or index ``key``; None where nothing is known to."""
    for kind in _sections(annotation):
        if isinstance(key, str) and key in (fields := _annotations(kind)):
            return fields[key]
    for kind in _choices(annotation):
        if get_origin(kind) is dict:
            return get_args(kind)[1]
        if get_origin(kind) is tuple and isinstance(key, int):
            return get_args(kind)[0]
        if get_origin(kind) is list:
            return get_args(kind)[0]
    return None


@cache
def _annotations(section: type[BaseModel]) -> dict[str, Any]:
    """Annotations of a section's fields, by name and by alias."""
    by_name = {name: field.annotation for name, field in section.model_fields.items()}
    return by_name | {field.alias: field.annotation for field in section.model_fields.values() if field.alias}


@cache
def _sections(annotation: Any) -> list[type[BaseModel]]:
    return [kind for kind in _choices(annotation) if isinstance(kind, type) and issubclass(kind, BaseModel)]


@cache  # a study validates thousands of runs
def _choices(annotation: Any) -> list[Any]:
    """The members of a union, what annotates them taken off."""
    if get_origin(annotation) is Annotated:
        return _choices(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [choice for member in get_args(annotation) for choice in _choices(member)]
    return [annotation]
