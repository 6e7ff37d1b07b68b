"""YAML as people mean it, and no text that stands for more than a machine holds."""

import re
from typing import Any

import yaml

from .errors import UserError

# Far beyond any configuration. Aliases can make a few lines stand for more than a machine holds.
_MOST_VALUES = 1_000_000
_MOST_BITS = 10_000  # of a whole number: 3,000 digits
_OWN_READING = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e11 as text, 1:30 as ninety, 010 as eight, 2026-11-31 as an error in Python, and merges duplicate
    keys silently: none of it is what a user means."""

    def compose_document(self) -> yaml.Node:
        node = super().compose_document()
        assert isinstance(node, yaml.Node)
        _count(node, {})
        return node


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _OWN_READING]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    _OWN_READING[0], re.compile(r"[-+]?(0b[01_]+|0x[0-9a-fA-F_]+|0|[1-9][0-9_]*)$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    _OWN_READING[1],
    re.compile(
        r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?$"
        r"|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"
        r"|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


def _count(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values ``node`` stands for, aliases written out; ``known`` by node, 0 for those it stands in."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in known:
        known[id(node)] = 0
        inner = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        known[id(node)] = 1 + sum(_count(part, known) for part in inner)
    elif known[id(node)] == 0:
        raise _error(node, "an alias stands for what it is part of")
    if known[id(node)] > _MOST_VALUES:
        raise _error(node, f"more than {_MOST_VALUES:,} values")
    return known[id(node)]


def _error(node: yaml.Node, message: str) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, message, node.start_mark)


def _mapping_without_duplicates(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":  # "<<": own keys win over merged ones, which is its purpose
            continue
        if not isinstance(key_node, yaml.ScalarNode):
            raise _error(key_node, "a list or a mapping cannot be a key")
        key = loader.construct_object(key_node)
        if key in seen:
            raise _error(key_node, f"the key {key!r} stands twice")
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


def _scalar(loader: _Loader, node: yaml.ScalarNode) -> Any:
    """What a tag asks for, if the text is such a thing."""
    try:
        value = yaml.SafeLoader.yaml_constructors[node.tag](loader, node)
    except (ValueError, LookupError, AttributeError) as error:
        raise _error(node, f"{node.value[:40]!r} is no {node.tag.rpartition(':')[2]}: {error}") from None
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        raise _error(node, f"{node.value[:20]}... has too many digits")
    return value


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_duplicates)
for _tag in (*_OWN_READING, "tag:yaml.org,2002:bool", "tag:yaml.org,2002:binary"):
    _Loader.add_constructor(_tag, _scalar)


def parse_yaml(text: str, origin: str) -> Any:
    """Parse YAML text; ``origin`` names it in errors.

    Raises:
        UserError: not YAML, a key that stands twice, or more than a million values.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{origin}: not valid YAML: {' '.join(str(error).split())[:1000]}") from None
    except RecursionError:
        raise UserError(f"{origin}: not valid YAML: sections or lists are nested too deeply") from None
