"""Slurm's short forms of node lists and task counts, read without its programs: a container may lack them."""

import re
from collections.abc import Iterator

from ..base.errors import UserError

_COUNT = re.compile(r"(\d+)(?:\(x(\d+)\))?")
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


def expand_hosts(text: str) -> list[str]:
    """Every node of a list such as ``a[01-03,7]b,login``, in its order.

    Raises:
        UserError: this is no list of nodes.
    """
    names = [name for item in _items(text) for name in _expand_item(item, text)]
    if not names or not all(names):
        raise _unreadable(text)
    return names


def expand_counts(text: str) -> list[int]:
    """A number for each node from a list such as ``2(x3),1``.

    Raises:
        UserError: this is no list of counts.
    """
    counts: list[int] = []
    for item in text.split(","):
        found = _COUNT.fullmatch(item)
        if found is None:
            raise UserError(f"{text!r} is not a list of task counts as Slurm writes it, such as 2(x3),1")
        counts += [int(found[1])] * int(found[2] or 1)
    return counts


def _items(text: str) -> Iterator[str]:
    """The parts between commas that stand outside brackets."""
    depth, start = 0, 0
    for position, character in enumerate(text):
        depth += (character == "[") - (character == "]")
        if depth not in (0, 1):
            raise _unreadable(text)
        if character == "," and depth == 0:
            yield text[start:position]
            start = position + 1
    if depth:
        raise _unreadable(text)
    yield text[start:]


def _expand_item(item: str, text: str) -> list[str]:
    """All nodes of one part; the last bracket counts fastest."""
    before, bracket, rest = item.partition("[")
    if not bracket:
        return [item]
    inside, _, after = rest.partition("]")
    numbers = [number for part in inside.split(",") for number in _expand_range(part, text)]
    tails = _expand_item(after, text)
    return [before + number + tail for number in numbers for tail in tails]


def _expand_range(part: str, text: str) -> list[str]:
    found = _RANGE.fullmatch(part)
    if found is None:
        raise _unreadable(text)
    first, last = found[1], found[2] or found[1]
    return [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]


def _unreadable(text: str) -> UserError:
    return UserError(f"{text!r} is not a list of nodes as Slurm writes it, such as node[01-03,7]")
