"""From a study to its runs: every combination of every group, named, validated, each computed once."""

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..base.config import merge, validate
from ..base.errors import UserError
from ..base.files import digest
from ..training.config import RunConfig
from .study_config import GroupConfig, StudyConfig, keys_of

# Always part of a run's name, so that a new axis in one group renames no run of another.
_ALWAYS_NAMED = ("model.shape", "training.flops", "training.tokens", "training.steps", "training.seed")
_SHORT = {
    "optimizer.lr": "lr",
    "training.batch": "b",
    "moe.experts": "E",
    "moe.active": "K",
    "moe.granularity": "G",
}


@dataclass(frozen=True)
class PlannedRun:
    """One run of a study. ``config.name`` equals ``name``, which is also the name of the run's folder."""

    name: str
    family: str
    groups: tuple[str, ...]
    config: RunConfig


@dataclass(frozen=True)
class _Combination:
    """A point of a group's grid: the values of its axes by key."""

    group: str
    values: Mapping[str, Any]

    def __str__(self) -> str:
        swept = ", ".join(f"{key}={value}" for key, value in self.values.items())
        return f"groups.{self.group}" + (f" ({swept})" if swept else "")


def expand(study: StudyConfig) -> list[PlannedRun]:
    """All runs of ``study``, by name.

    Groups may overlap: a run that two groups of the same family ask for is one run, under the shorter name. Two
    families may not share a run, because a point of the study carries one label.

    Raises:
        UserError: a run is not valid, stands twice in a group, belongs to two families, or cannot be told from
            another by its name; says which groups and keys.
    """
    by_hash: dict[str, tuple[PlannedRun, _Combination]] = {}
    for group_name, group in study.groups.items():
        for combination in _combinations(group_name, group):
            run = _plan(study, group, combination)
            found = by_hash.setdefault(run.config.scientific_hash, (run, combination))
            if found[1] is not combination:
                by_hash[run.config.scientific_hash] = (_shared(found, (run, combination)), found[1])
    _refuse_equal_names(list(by_hash.values()))
    return sorted((run for run, _ in by_hash.values()), key=lambda run: run.name)


def _combinations(name: str, group: GroupConfig) -> Iterator[_Combination]:
    axes = []
    for axis, values in group.grid.items():
        keys = keys_of(axis)
        axes.append([dict(zip(keys, value if len(keys) > 1 else [value], strict=True)) for value in values])
    for choice in itertools.product(*axes):
        yield _Combination(name, {key: value for part in choice for key, value in part.items()})


def _plan(study: StudyConfig, group: GroupConfig, combination: _Combination) -> PlannedRun:
    # Two one-thread runs side by side are faster than one run on two threads at every size a study here has.
    content: dict[str, Any] = merge({"runtime": {"threads": 1}}, study.run)
    for key, value in (*group.set.items(), *combination.values.items()):
        content = merge(content, _nested(key, value))
    rule = study.lr_rule
    optimizer = content.get("optimizer")
    by_rule = rule is not None and not (isinstance(optimizer, dict) and optimizer.get("lr") is not None)
    if rule is not None and by_rule:
        content = merge(content, {"optimizer": {"lr": rule.base_lr}})
    config = validate(RunConfig, {**content, "name": study.name}, str(combination))
    if rule is not None and by_rule:
        rate = rule.learning_rate(config.model.width)
        config = config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"lr": rate})})
    name = _name(group, combination, config)
    if len(name) > 200:
        raise UserError(f"{combination}: the name {name} is longer than 200 characters; shorten values or family")
    return PlannedRun(name, group.family, (combination.group,), config.model_copy(update={"name": name}))


def _nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    assert isinstance(value, dict)
    return value


def _shared(one: tuple[PlannedRun, _Combination], two: tuple[PlannedRun, _Combination]) -> PlannedRun:
    """The run that two combinations both describe."""
    (first, where), (second, elsewhere) = one, two
    if where.group == elsewhere.group:
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
    return PlannedRun(kept.name, kept.family, tuple(sorted({*first.groups, *second.groups})), kept.config)


def _refuse_equal_names(runs: list[tuple[PlannedRun, _Combination]]) -> None:
    """Names become folders, and some file systems do not tell upper from lower case."""
    seen: dict[str, tuple[PlannedRun, _Combination]] = {}
    for run, combination in runs:
        other, elsewhere = seen.setdefault(run.name.casefold(), (run, combination))
        if other is not run:
            different = ", ".join(_differences(other.config.model_dump(), run.config.model_dump())) or "name"
            raise UserError(
                f"{elsewhere} and {combination} would both be named {run.name}, but differ in {different}; put that "
                "key into grid instead of set, or give the groups different families"
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


def _name(group: GroupConfig, combination: _Combination, config: RunConfig) -> str:
    """Family, size, budget, what else the group sweeps (by key), seed: a function of the run and its group alone."""
    training, model = config.training, config.model
    size = _text(model.shape) if model.shape is not None else f"w{model.width}L{model.layers}"
    if training.flops is not None:
        budget = number(training.flops)
    elif training.tokens is not None:
        budget = f"{number(training.tokens)}tok"
    else:
        budget = f"{training.steps}steps"
    swept = [_SHORT.get(key, key) + _text(combination.values[key]) for key in _naming_keys(group)]
    return "-".join([group.family, size, budget, *swept, f"s{training.seed}"])


def _naming_keys(group: GroupConfig) -> list[str]:
    """Swept keys that tell the runs of a group apart: of keys that move together the first ones that do."""
    named: list[str] = []
    for axis, values in group.grid.items():
        keys = keys_of(axis)
        rows = [value if len(keys) > 1 else [value] for value in values]
        enough = next((n for n in range(1, len(keys)) if len({repr(row[:n]) for row in rows}) == len(rows)), len(keys))
        named += keys[:enough]
    return sorted(set(named) - set(_ALWAYS_NAMED))


def number(value: float) -> str:
    """The shortest text that reads back as ``value``: 1e12, 0.01, 256."""
    shortest = next(text for digits in range(1, 18) if float(text := f"{value:.{digits}g}") == value)
    mantissa, separator, exponent = shortest.partition("e")
    return f"{mantissa}e{int(exponent)}" if separator else mantissa


def _text(value: Any) -> str:
    """A value as part of a file name."""
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, int | float):
        return number(value) if isinstance(value, float) else str(value)
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9._+]+", value):
        return value
    return digest(value)[:8]
