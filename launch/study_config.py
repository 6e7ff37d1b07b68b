"""The study file: what is common to all runs, groups of runs with the axes they sweep, and what is fitted."""

import re
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, Field, model_validator

from ..base.complaints import brief
from ..base.config import apply_overrides, find_config, load_yaml, merge, validate
from ..base.errors import UserError
from ..base.yaml_text import parse_yaml
from ..training.config import BUDGETS, RunConfig

# Families and studies name folders and files.
_LABEL = r"^[A-Za-z0-9][A-Za-z0-9._+-]*$"

# Dotted run keys, each with the value or the list of values that are meant.
Rule = dict[str, Any]


class GroupConfig(BaseModel, frozen=True, extra="forbid"):
    """Runs of one family: every combination of the values in ``grid``, on top of ``set``.

    Keys are dotted keys of a run file. Several keys joined by commas move together, their values being lists:
    ``"training.flops, training.batch": [[1e11, 2], [1e12, 4]]``.

    Of these combinations those stay that match a mapping of ``include``, if there is one, and none of ``exclude``.
    A mapping matches when all its keys do.

    With ``branch`` runs that differ in their budget alone become decay branches of the longest one.
    """

    family: str = Field(pattern=_LABEL, max_length=60, description="label in names, tables and plots")
    set: dict[str, Any] = Field({}, description="values of every run of the group")
    grid: dict[str, list[Any]] = Field({}, description="values to sweep")
    include: tuple[Rule, ...] = ()
    exclude: tuple[Rule, ...] = ()
    branch: bool = Field(False, description="share a trunk between budgets; needs schedule.kind wsd")


class LearningRateCheck(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """Repeats one run of every family at other learning rates, to show how far the rule is from the best."""

    at: Rule = Field(min_length=1, description="which run of a family: dotted run keys and their values")
    factors: tuple[float, ...] = Field((0.5, 2.0), min_length=1, description="of the rule's learning rate")

    @model_validator(mode="after")
    def _check(self) -> Self:
        for factor in self.factors:
            if factor <= 0 or factor == 1 or self.factors.count(factor) > 1:
                raise ValueError(
                    f"lr_rule.check.factors ({factor:g}): distinct positive numbers other than 1 are expected"
                )
        return self


class LearningRateRule(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """optimizer.lr = base_lr * (base_width / model.width) ** power, for runs that give no optimizer.lr."""

    base_lr: float = Field(gt=0)
    base_width: int = Field(ge=1)
    power: float = 1.0
    check: LearningRateCheck | None = None

    def learning_rate(self, width: int, factor: float = 1.0) -> float:
        """``factor`` times the rate for a width.

        Rounded to 6 digits, so that the last bit of a machine's ``pow`` does not make another run of it.
        """
        return float(f"{factor * self.base_lr * (self.base_width / width) ** self.power:.6g}")

    def describe(self) -> str:
        return f"optimizer.lr = {self.base_lr:g} * ({self.base_width} / model.width)^{self.power:g}"


class FitRequest(BaseModel, frozen=True, extra="forbid"):
    """A law to fit to the finished points."""

    law: str
    family: str | None = Field(None, description="default: the points of all families together")
    map: dict[str, str] = Field({}, description="column of the points table for a variable of the law")
    hold_out: str | None = Field(None, description="condition on points kept out of the fit, such as c>=1e12")
    predict: bool = Field(
        False, description="train the runs held out last, after the register says what the fit expects of them"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.predict and self.hold_out is None:
            raise ValueError(
                f"fit.predict (law {self.law}): what is predicted must be held out; give hold_out, such as c>=1e12"
            )
        return self

    @property
    def name(self) -> str:
        """Names the file of the fit."""
        law = self.law.rpartition(":")[2]  # of a law of one's own, its name alone
        return law if self.family is None else f"{law}-{self.family}"


class StudyConfig(BaseModel, frozen=True, extra="forbid"):
    """One study."""

    name: str = Field(pattern=_LABEL, max_length=100)
    run: dict[str, Any] = Field({}, description="keys of a run file that all runs share; may hold extends")
    groups: dict[str, GroupConfig] = Field(min_length=1)
    lr_rule: LearningRateRule | None = None
    scale: float = Field(1.0, gt=0, le=1, description="shrinks the study: FLOPs become so many times what they are")
    workers: int | None = Field(None, ge=1, description="runs side by side; default: one a core, or a GPU")
    fit: tuple[FitRequest, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_sections("run", self.run)
        for name, group in self.groups.items():
            _check_sections(f"groups.{name}.set", group.set)
            _check_group(f"groups.{name}", group)
        optimizer = self.run.get("optimizer")
        given = optimizer.get("lr") if isinstance(optimizer, dict) else None
        if self.lr_rule is not None and given is not None:
            raise ValueError(f"lr_rule and run.optimizer.lr ({given}) both set the learning rate; keep one of them")
        families = {group.family for group in self.groups.values()}
        for request in self.fit:
            if request.family is not None and request.family not in families:
                raise ValueError(f"fit.family ({request.family}): no group has it; there are {', '.join(families)}")
        names = [request.name for request in self.fit]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"fit: {name} stands twice")
        return self


def keys_of(axis: str) -> list[str]:
    """Dotted keys of an axis of ``grid``."""
    return [key.strip() for key in axis.split(",")]


def _check_sections(where: str, content: dict[str, Any]) -> None:
    """Else keys of a group would take the place of what is no section."""
    for key in RunConfig.model_fields.keys() & content.keys() - {"name"}:
        if not isinstance(content[key], dict | None):
            raise ValueError(f"{where}.{key} ({brief(content[key])}): a section of keys with values is expected")


def _check_group(where: str, group: GroupConfig) -> None:
    swept = [(key, axis) for axis in group.grid for key in keys_of(axis)]
    for section, keys in (("set", list(group.set)), ("grid", [key for key, _ in swept])):
        if "name" in keys:
            raise ValueError(
                f"{where}.{section}.name: runs are named after their values; give the group another family"
            )
    seen: dict[str, str] = {}
    for key, axis in swept:
        if key in seen:
            raise ValueError(f"{where}.grid: {key} is swept by two axes, {seen[key]!r} and {axis!r}; join them in one")
        if key in group.set:
            raise ValueError(f"{where}.set.{key} stands in grid too; keep one of them")
        seen[key] = axis
    for key in seen:
        for other in seen:
            if key.startswith(f"{other}."):
                raise ValueError(f"{where}.grid: {other} and {key} sweep the same setting; keep one of them")
    for section, rules in (("include", group.include), ("exclude", group.exclude)):
        if {} in rules:
            raise ValueError(f"{where}.{section}: an empty mapping matches everything; give it a key")
    for axis, values in group.grid.items():
        _check_axis(f"{where}.grid.{axis}", len(keys_of(axis)), values)


def _check_axis(where: str, keys: int, values: list[Any]) -> None:
    if not values:
        raise ValueError(f"{where}: has no values")
    for value in values:
        if keys > 1 and not (isinstance(value, list) and len(value) == keys):
            raise ValueError(f"{where}: {brief(value)} must be a list of {keys} values, one for each key")


def load_study(path: Path, overrides: list[str] | None = None) -> StudyConfig:
    """Read a study file, apply ``key=value`` overrides, validate. Runs are validated when they are expanded.

    A study that ``extends`` another has its groups too, merged by name. Names in ``run.extends`` are looked up beside
    ``path``, also those that come from a study it extends.

    Raises:
        UserError: anything wrong with the file or the overrides.
    """
    content = load_yaml(path)
    for override in overrides or []:
        content = _override(content, override)
    content.setdefault("name", path.stem)
    run = content.get("run")
    if isinstance(run, dict) and "extends" in run:
        content["run"] = _resolve_extends(run, path)
    return validate(StudyConfig, content, str(path))


def _override(content: dict[str, Any], override: str) -> dict[str, Any]:
    """Apply one override. What follows ``groups.NAME.set.`` or ``.grid.`` is one dotted run key, as in the file."""
    in_group = re.match(r"groups\.([^.=]+)\.(set|grid)\.([^=]+)=", override)
    if in_group is not None:
        group, section, key = in_group.groups()
        value = parse_yaml(override[in_group.end() :], f"override {override!r}")
        return merge(content, {"groups": {group: {section: {key: value}}}})
    if override.startswith(tuple(f"run.training.{budget}=" for budget in BUDGETS)):
        # It takes the place of the file's budget, whichever of the three that is.
        content = merge(content, {"run": {"training": dict.fromkeys(BUDGETS)}})
    return apply_overrides(content, [override])


def _resolve_extends(run: dict[str, Any], path: Path) -> dict[str, Any]:
    """``run.extends`` names run files, found beside the study file or among the shipped configurations."""
    parents = run["extends"]
    names = [parents] if isinstance(parents, str) else parents
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: run.extends ({brief(parents)}): a file name or a list of them is expected")
    merged: dict[str, Any] = {}
    for name in names:
        merged = merge(merged, load_yaml(find_config(name, path.parent, f"{path}: run.extends: ")))
    return merge(merged, {key: value for key, value in run.items() if key != "extends"})
