"""Configuration files: YAML with ``extends:``, ``key=value`` overrides, and errors that name the field.

Every section of a configuration is a frozen pydantic model with ``extra="forbid"``, owned by the folder that
uses it. This module reads files into plain dictionaries and turns pydantic's complaints into `UserError`.
"""

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from .errors import UserError

Model = TypeVar("Model", bound=BaseModel)
SHIPPED = Path(__file__).parent.parent / "configs"


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e11 as text and merges duplicate keys silently: neither is what a user means."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    __import__("re").compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


def _mapping_without_duplicates(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":  # "<<": own keys win over merged ones, which is its purpose
            continue
        key = loader.construct_object(key_node)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", key_node.start_mark)
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_duplicates)


def parse_yaml(text: str, origin: str) -> Any:
    """Parse YAML text; ``origin`` names it in errors."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{origin}: not valid YAML: {' '.join(str(error).split())}") from None


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Deep merge of two dictionaries; lists and scalars of ``over`` replace those of ``base``."""
    merged = dict(base)
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def find_config(name: str, folder: Path) -> Path:
    """``name`` beside the file that mentions it, else among the shipped ``configs/``."""
    for candidate in (folder / name, SHIPPED / name):
        if candidate.is_file():
            return candidate
    raise UserError(f"{name}: no such file in {folder} or in the shipped configs")


def load_yaml(path: Path, _chain: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read ``path`` with everything it ``extends`` (a name or a list of names, later ones win).

    Raises:
        UserError: missing, unreadable or malformed file, or a circle of ``extends``.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    content = parse_yaml(text, str(path)) or {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: a mapping of keys to values is expected, not a {type(content).__name__}")
    parents = content.pop("extends", [])
    resolved = path.resolve()
    if resolved in _chain:
        raise UserError(f"{path}: extends itself through {' -> '.join(p.name for p in (*_chain, resolved))}")
    parents = [parents] if isinstance(parents, str) else parents
    if not (isinstance(parents, list) and all(isinstance(parent, str) for parent in parents)):
        raise UserError(f"{path}: extends ({parents!r}): a file name or a list of file names is expected")
    merged: dict[str, Any] = {}
    for parent in parents:
        merged = merge(merged, load_yaml(find_config(parent, path.parent), (*_chain, resolved)))
    return merge(merged, content)


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
    try:
        return model.model_validate(content)
    except ValidationError as error:
        lines = [_explain(model, problem) for problem in error.errors()]
        raise UserError("\n".join(f"{origin}: {line}" for line in dict.fromkeys(lines))) from None


def _explain(model: type[BaseModel], problem: Any) -> str:
    field = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        close = difflib.get_close_matches(str(problem["loc"][-1]), _names_at(model, problem["loc"][:-1]), n=1)
        return f"{field}: unknown key" + (f"; did you mean {close[0]}?" if close else "")
    if problem["type"] == "missing":
        return f"{field}: required and not given"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return message  # our own checks name their fields themselves
    return f"{field} ({problem['input']!r}): {message[0].lower()}{message[1:]}"


def _names_at(model: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    """Field names of the (sub)model at a location inside ``model``."""
    current: Any = model
    for part in location:
        if not (isinstance(current, type) and issubclass(current, BaseModel)) or part not in current.model_fields:
            return []
        annotation = current.model_fields[part].annotation
        options = (annotation, *get_args(annotation))
        current = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)
    return list(current.model_fields) if current is not None else []
