"""Configuration files: YAML with ``extends:``, ``key=value`` overrides, and errors that name the field.

Every section of a configuration is a frozen pydantic model with ``extra="forbid"``, owned by the folder that
uses it. This module reads files into plain dictionaries and turns pydantic's complaints into `UserError`.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from .complaints import brief, explain, wrong_numbers
from .errors import UserError
from .yaml_text import parse_yaml

Model = TypeVar("Model", bound=BaseModel)
SHIPPED = Path(__file__).parent.parent / "configs"
_LARGEST_FILE = 4 << 20  # bytes; reading YAML takes seconds for every one of them


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Deep merge of two dictionaries; lists and scalars of ``over`` replace those of ``base``."""
    merged = dict(base)
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def find_config(name: str, folder: Path, asked_by: str = "") -> Path:
    """``name`` beside the file that mentions it, else among the shipped ``configs/``.

    Raises:
        UserError: neither; it starts with ``asked_by``, which says where the name stands.
    """
    for candidate in (folder / name, SHIPPED / name):
        if candidate.is_file():
            return candidate
    raise UserError(f"{asked_by}{name}: no such file in {folder} or in the shipped configs")


def load_yaml(path: Path, _chain: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read ``path`` with everything it ``extends`` (a name or a list of names, later ones win).

    Raises:
        UserError: missing, unreadable or malformed file, or a circle of ``extends``.
    """
    path = Path(path)
    content = parse_yaml(_read(path), str(path))
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise UserError(f"{path}: a mapping of keys to values is expected, not a {type(content).__name__}")
    parents = content.pop("extends", [])
    resolved = path.resolve()
    if resolved in _chain:
        raise UserError(f"{path}: extends itself through {' -> '.join(p.name for p in (*_chain, resolved))}")
    parents = [parents] if isinstance(parents, str) else parents
    if not (isinstance(parents, list) and all(isinstance(parent, str) for parent in parents)):
        raise UserError(f"{path}: extends ({brief(parents)}): a file name or a list of file names is expected")
    merged: dict[str, Any] = {}
    for parent in parents:
        merged = merge(merged, load_yaml(find_config(parent, path.parent, f"{path}: extends: "), (*_chain, resolved)))
    return merge(merged, content)


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST_FILE + 1)  # /dev/zero has no end
        text = content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if len(content) > _LARGEST_FILE:
        raise UserError(f"{path}: larger than {_LARGEST_FILE >> 20} MiB; a configuration in YAML is expected")
    return text


def apply_overrides(content: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Apply ``a.b=value`` strings, values read as YAML, onto a dictionary."""
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not all(key.split(".")):
            raise UserError(f"override {override!r}: write key=value, for example training.steps=100")
        value: Any = parse_yaml(text, f"override {override!r}")
        for part in reversed(key.split(".")):
            value = {part: value}
        content = merge(content, value)
    return content


def validate(model: type[Model], content: Mapping[str, Any], origin: str) -> Model:
    """Build ``model`` from a dictionary, or say in a `UserError` which fields are wrong and what to write."""
    lines = list(wrong_numbers(model, content))
    if not lines:
        try:
            return model.model_validate(content)
        except ValidationError as error:
            lines = [explain(model, problem) for problem in error.errors()]
    raise UserError("\n".join(f"{origin}: {line}" for line in dict.fromkeys(lines)))
