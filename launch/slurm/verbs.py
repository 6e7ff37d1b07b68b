"""What ``study submit`` and ``study resubmit`` do, from a plan to jobs."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from ...base.errors import UserError
from ..cluster_config import ClusterConfig
from ..failure import is_memory
from ..held_out import predicted_runs
from ..placing import placed
from ..plan import plan_study
from ..planned import Expansion, Plan
from ..study_config import StudyConfig
from ..study_folder import StudyFolder
from ..study_run import refuse, register_expected_of
from . import commands
from .journal import Journal
from .states import RunState, study_states
from .submission import Submission, compose, submit


class Result(NamedTuple):
    """What was, or would be, submitted; ``jobs`` by label is empty after a dry run. ``states`` are from before."""

    submission: Submission
    jobs: dict[str, int]
    states: list[RunState]
    warnings: list[str]


def submit_study(
    study: StudyConfig, expansion: Expansion, folder: StudyFolder, cluster: ClusterConfig, world: int | None, dry: bool
) -> Result:
    """Submit the runs that are neither done nor running nor were ever submitted. ``dry``: only say so.

    Runs that laws predict are held back until the others are over: the call after that registers what the laws expect
    of them, and submits them.

    Raises:
        UserError: the study, the cluster or the folder is wrong, or Slurm refuses.
    """
    expansion = _on(cluster, expansion, world)
    plan = plan_study(study, expansion, world)
    return _carry_out(plan, study, expansion, folder, cluster, world, dry, lambda state: state.to_submit)


def resubmit_study(folder: StudyFolder, cluster: ClusterConfig, dry: bool) -> Result:
    """Submit the runs that failed or were lost again; those that lacked memory ask for twice of what they had.

    Raises:
        UserError: as `submit_study`.
    """
    study, expansion = folder.open()
    world = Journal(folder.path).world()
    expansion = _on(cluster, expansion, world)
    plan = plan_study(study, expansion, world)
    return _carry_out(plan, study, expansion, folder, cluster, world, dry, lambda state: state.to_resubmit)


def _on(cluster: ClusterConfig, expansion: Expansion, world: int | None) -> Expansion:
    """The layouts that ``study plan --cluster`` shows; those of the files where nobody knows the cluster's hardware."""
    return expansion if cluster.hardware is None else placed(expansion, cluster, world)


def _carry_out(
    plan: Plan,
    study: StudyConfig,
    expansion: Expansion,
    folder: StudyFolder,
    cluster: ClusterConfig,
    world: int | None,
    dry: bool,
    wanted: Callable[[RunState], bool],
) -> Result:
    last = predicted_runs(study, expansion, plan)

    def composed() -> Result:
        states, warnings = study_states(folder, expansion.everything)
        if warnings and not dry:
            raise UserError(f"nothing was submitted, since what runs already is not known: {'; '.join(warnings)}")
        possible = {row.name for row in plan.rows}
        names = {state.name for state in states if wanted(state)} & possible
        later = sorted(names & last.keys())
        before = [state.state for state in states if state.name not in last and state.name in possible]
        if later and (unfinished := sum(state not in ("done", "failed") for state in before)):
            names -= last.keys()
            warnings = [*warnings, _held_back(later, unfinished)]
        elif later and not dry and not register_expected_of(later, study, expansion, last, folder):
            names -= last.keys()
        runs = [run for run in expansion.runs if run.name in names]
        submission = compose(folder, study.name, plan, runs, cluster, world, _memory_after_failures(states))
        return Result(submission, {}, states, [*plan.warnings, *warnings, *submission.warnings])

    if dry:
        return composed()
    commands.require_slurm()
    with folder.locked():
        folder.claim(study, expansion)
        for impossible in plan.impossible:
            refuse(folder.run(impossible.name), impossible)
        result = composed()
        return result._replace(jobs=submit(result.submission, folder))


def _held_back(later: list[str], unfinished: int) -> str:
    shown = f"{', '.join(later[:3])}{', ...' if len(later) > 3 else ''}"
    found = f"{len(later)} runs that laws predict are held back ({shown}): {unfinished} others come first"
    return f"{found}; give this command again when they are over"


def _memory_after_failures(states: list[RunState]) -> Mapping[str, int]:
    """MiB to ask for, for runs that ran out of what they asked for before."""
    return {
        state.name: 2 * state.memory_mb
        for state in states
        if state.memory_mb and (is_memory(state.reason) or "OUT_OF_MEMORY" in state.reason)
    }
