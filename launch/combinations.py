"""The combinations of a group: the product of its axes, thinned by its rules."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..base.config import merge
from ..base.errors import UserError
from .run_keys import Content, check_rule, matches, nested, shown
from .study_config import GroupConfig, StudyConfig, keys_of


@dataclass(frozen=True)
class Combination:
    """A point of a group's grid: the values of its axes by key, and with them the content of a run file."""

    group: str
    values: Mapping[str, Any]
    content: Content

    def __str__(self) -> str:
        return f"groups.{self.group}" + (f" ({shown(self.values)})" if self.values else "")


def combinations(study: StudyConfig, name: str) -> list[Combination]:
    """The combinations of the group ``name`` that its rules leave.

    Raises:
        UserError: a rule names an unknown key or matches nothing, or the rules leave nothing.
    """
    group = study.groups[name]
    # Two one-thread runs side by side are faster than one run on two threads at every size a study here has.
    base: dict[str, Any] = merge({"runtime": {"threads": 1}}, study.run)
    for key, value in group.set.items():
        base = merge(base, nested(key, value))
    found = []
    for values in _product(group):
        content = base
        for key, value in values.items():
            content = merge(content, nested(key, value))
        found.append(Combination(name, values, content))
    return _select(f"groups.{name}", group, found)


def _product(group: GroupConfig) -> Iterator[dict[str, Any]]:
    axes = []
    for axis, values in group.grid.items():
        keys = keys_of(axis)
        axes.append([dict(zip(keys, value if len(keys) > 1 else [value], strict=True)) for value in values])
    for choice in itertools.product(*axes):
        yield {key: value for part in choice for key, value in part.items()}


def _select(where: str, group: GroupConfig, found: list[Combination]) -> list[Combination]:
    for section, rules in (("include", group.include), ("exclude", group.exclude)):
        for rule in rules:
            check_rule(f"{where}.{section}", rule, [combination.content for combination in found])
    kept = [
        combination
        for combination in found
        if (not group.include or any(matches(rule, combination.content) for rule in group.include))
        and not any(matches(rule, combination.content) for rule in group.exclude)
    ]
    if not kept:
        raise UserError(f"{where}: include and exclude leave none of the {len(found)} combinations")
    return kept
