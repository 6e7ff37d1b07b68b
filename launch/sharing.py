"""Runs that several groups ask for are one run; runs that are not the same must not look so."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..base.errors import UserError
from .combinations import Combination
from .planned import ImpossibleRun, PlannedRun
from .run_keys import Content


@dataclass(frozen=True)
class Candidate:
    """A combination as a run.

    Attributes:
        content: what was validated: the combination's own, at the study's scale.
        keys: which run keys its name tells.
        by_rule: whether its learning rate is the rule's.
    """

    combination: Combination
    content: Content
    keys: tuple[str, ...]
    by_rule: bool
    run: PlannedRun


def share(candidates: Iterable[Candidate]) -> dict[str, PlannedRun]:
    """Each run once, by scientific hash.

    Raises:
        UserError: a run stands twice in a group, has two families, or two settings of what does not change its result.
    """
    found: dict[str, tuple[PlannedRun, Combination]] = {}
    for candidate in candidates:
        key = candidate.run.config.scientific_hash
        if key in found:
            run, where = found[key]
            found[key] = (_shared(run, where, candidate.run, candidate.combination), where)
        else:
            found[key] = (candidate.run, candidate.combination)
    return {key: run for key, (run, _) in found.items()}


def _shared(first: PlannedRun, where: Combination, second: PlannedRun, elsewhere: Combination) -> PlannedRun:
    """The run that two combinations both describe."""
    if elsewhere.group in first.groups:
        raise UserError(f"{where} and {elsewhere} give the same run; leave one of them out")
    if first.family != second.family:
        raise UserError(
            f"{where} of family {first.family} and {elsewhere} of family {second.family} give the same run, and a run "
            "has one family; leave it out of one of the groups or give them the same family"
        )
    different = _differences(first.config.model_dump(), second.config.model_dump())
    if different:
        raise UserError(
            f"{where} and {elsewhere} give the same run with other settings of {', '.join(different)}, which do not "
            "change its result; give both the same"
        )
    kept = min((first, second), key=lambda run: (len(run.name), run.name))
    return replace(kept, groups=tuple(sorted({*first.groups, *second.groups})))


def refuse_equal_names(runs: Iterable[PlannedRun], impossible: Iterable[ImpossibleRun]) -> None:
    """Names become folders, and some file systems do not tell upper from lower case.

    Raises:
        UserError: two runs would share a folder; says in what they differ.
    """
    seen: dict[str, PlannedRun | ImpossibleRun] = {}
    everything: list[PlannedRun | ImpossibleRun] = [*runs, *impossible]
    for run in everything:
        other = seen.setdefault(run.name.casefold(), run)
        if other is run:
            continue
        if isinstance(run, ImpossibleRun):
            different = f"whether they can be run ({run.reason})"
        else:
            assert isinstance(other, PlannedRun)  # those come first
            different = ", ".join(_differences(other.config.model_dump(), run.config.model_dump())) or "name"
        raise UserError(
            f"groups.{other.groups[0]} and groups.{run.groups[0]} would both name a run {run.name}, but differ in "
            f"{different}; put that key into grid instead of set, or give the groups different families"
        )


def _differences(one: Mapping[str, Any], two: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys in which two configurations differ, names aside."""
    found = []
    for key in sorted({*one, *two} - ({"name"} if not prefix else set())):
        left, right = one.get(key), two.get(key)
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            found += _differences(left, right, f"{prefix}{key}.")
        elif left != right:
            found.append(prefix + key)
    return found
