"""Many budgets for the price of one: runs that differ in their budget alone, as decay branches of the longest one.

With a ``wsd`` schedule the learning rate stays until the decay, so a shorter run is the beginning of a longer one
followed by an own decay (Hägele et al. 2024, arXiv 2405.18392). The longest run of such a set, the trunk, keeps a
checkpoint where each of the others begins to decay, and those start there.
"""

from collections.abc import Mapping
from dataclasses import replace

from ..base.config import validate
from ..base.errors import UserError
from ..base.files import digest
from ..training.budget import steps_of
from ..training.config import BUDGETS, RunConfig
from ..training.schedule import check_schedule, decay_start
from .planned import PlannedRun
from .study_config import StudyConfig
from .vocabularies import Vocabularies


def branch(study: StudyConfig, runs: Mapping[str, PlannedRun]) -> dict[str, PlannedRun]:
    """``runs`` with trunks and branches in place of the runs of groups that say ``branch``. Keys are kept.

    Raises:
        UserError: a group whose runs cannot branch; names it.
    """
    branching = {name for name, group in study.groups.items() if group.branch}
    sets: dict[str, list[str]] = {}
    for key, run in runs.items():
        if branching & set(run.groups):
            _check(run)
            sets.setdefault(_without_budget(run.config), []).append(key)
    found = dict(runs)
    vocabularies = Vocabularies()
    for keys in sets.values():
        steps = {key: count for key in keys if (count := _steps(runs[key].config, vocabularies)) is not None}
        if steps:
            found.update(_branched({key: runs[key] for key in steps}, steps))
    return found


def _steps(config: RunConfig, vocabularies: Vocabularies) -> int | None:
    """Steps of a run; None if it cannot start: the plan says why, and the others branch without it."""
    try:
        steps = steps_of(config, vocabularies.of(config.data))
        check_schedule(config, steps)
    except UserError:
        return None
    return steps


def _check(run: PlannedRun) -> None:
    schedule = run.config.schedule
    if schedule.kind != "wsd" or 0 < schedule.warmup < 1:
        raise UserError(
            f"groups.{run.groups[0]}.branch: {run.name} has schedule.kind {schedule.kind} and schedule.warmup "
            f"{schedule.warmup:g}; branches need kind wsd and a warm-up in steps"
        )


def _without_budget(config: RunConfig) -> str:
    content = config.model_dump(mode="json", exclude={"name"})
    for budget in BUDGETS:
        content["training"].pop(budget)
    return digest(content)


def _branched(runs: Mapping[str, PlannedRun], steps: Mapping[str, int]) -> dict[str, PlannedRun]:
    """The longest of ``runs`` as the trunk of the others."""
    longest = max(runs, key=lambda key: steps[key])
    trunk = runs[longest]
    shorter = [key for key in runs if steps[key] < steps[longest]]
    if not shorter:
        return dict(runs)
    found = {**runs, longest: _with_schedule(trunk, {"branches": sorted({steps[key] for key in shorter})})}
    for key in shorter:
        start = decay_start(runs[key].config.schedule, steps[key])
        parent = {"run": f"../{trunk.name}", "step": start}
        found[key] = replace(_with_schedule(runs[key], {"parent": parent}), trunk=trunk.name)
    return found


def _with_schedule(run: PlannedRun, change: Mapping[str, object]) -> PlannedRun:
    content = run.config.model_dump(mode="json")
    content["schedule"].update(change)
    return replace(run, config=validate(RunConfig, content, run.name))


def own_steps(config: RunConfig, steps: int) -> int:
    """Steps that a run trains itself, of the ``steps`` that made its model."""
    return steps - (config.schedule.parent.step if config.schedule.parent else 0)
