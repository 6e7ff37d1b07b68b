"""``study run``: what is not done yet, side by side, then points, fits and report."""

import sys
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from ..base.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, UserError
from ..base.progress import duration
from ..training.status import read_status, write_status
from .environment import world_of_launcher
from .held_out import predicted_runs
from .output import note
from .plan import plan_study
from .plan_warnings import text_warnings
from .planned import Expansion, ImpossibleRun, Plan, PlannedRun
from .study_config import FitRequest, StudyConfig
from .study_folder import StudyFolder
from .tables import registered_text


def run_study(
    study: StudyConfig,
    expansion: Expansion,
    folder: StudyFolder,
    quiet: bool,
    only: Collection[str] | None = None,
) -> int:
    """Bring the study in ``folder`` to its end, or to where a stop request leaves it.

    Runs that failed are tried again: what ailed them may have been mended. Impossible runs count as failed.

    Args:
        only: names of the runs to do; the others stay as they are.

    Returns:
        Exit code: 0 all runs are done, 1 some failed, 75 stopped on request.

    Raises:
        UserError: no run is possible, another study or configuration lives in the folder, or its runs wait or run under
            Slurm; nothing was started.
    """
    if world_of_launcher()[1] > 1:
        raise UserError("study run starts its own processes; call it alone, not under torchrun, srun or mpirun")
    plan = plan_study(study, expansion)
    possible = {row.name for row in plan.rows}
    runs = [run for run in expansion.runs if run.name in possible]
    last = predicted_runs(study, expansion, plan) if only is None else {}
    with folder.locked():
        folder.claim(study, expansion)
        _leave_to_slurm(folder, expansion)
        for impossible in plan.impossible:
            refuse(folder.run(impossible.name), impossible)
        wanted = [run for run in runs if only is None or run.name in only]
        pending = [run for run in wanted if not is_done(folder.run(run.name))]
        for warning in plan.warnings if pending or plan.impossible else ():
            note(f"warning: {warning}")
        first = [run for run in pending if run.name not in last]
        code = _run_pending(runs, first, plan, folder, quiet) if first else EXIT_DONE
        later = [run for run in pending if run.name in last]
        if later and code != EXIT_STOPPED:
            code = max(code, _predict_and_run(study, expansion, runs, later, last, plan, folder, quiet))
    return EXIT_FAILED if code == EXIT_DONE and plan.impossible else code


def _predict_and_run(
    study: StudyConfig,
    expansion: Expansion,
    runs: Sequence[PlannedRun],
    later: Sequence[PlannedRun],
    last: Mapping[str, Sequence[FitRequest]],
    plan: Plan,
    folder: StudyFolder,
    quiet: bool,
) -> int:
    """Train runs that laws are tested on, once the register says what the laws expect of them. Exit code.

    Where a law cannot be fitted yet its runs are not started: a prediction would come too late for ever.
    """
    if not register_expected_of([run.name for run in later], study, expansion, last, folder):
        return EXIT_FAILED
    return _run_pending(runs, later, plan, folder, quiet)


def register_expected_of(
    later: Sequence[str],
    study: StudyConfig,
    expansion: Expansion,
    last: Mapping[str, Sequence[FitRequest]],
    folder: StudyFolder,
) -> bool:
    """Have the register say what the laws expect of the runs ``later``; False, with notes, where one cannot be fitted.

    Args:
        last: of all runs that are trained last, the fits that predict them.
    """
    from .collect import collect
    from .predictions import register_missing

    collected = collect(folder)
    missing = sorted({request.name for name in later for request in last[name]} - set(collected.fits))
    if missing:
        for warning in collected.warnings:
            note(f"warning: {warning}")
        note(f"{len(later)} runs are not started: nothing predicts them ({', '.join(missing)})")
        return False
    for entry in register_missing(folder, study, expansion, {name: last[name] for name in later}, collected.points):
        note(registered_text(entry))
    return True


def _leave_to_slurm(folder: StudyFolder, expansion: Expansion) -> None:
    """Refuse to start what a cluster is doing."""
    from .slurm.journal import Journal
    from .slurm.states import study_states

    if not Journal(folder.path).batches():
        return
    active = [state for state in study_states(folder, expansion.everything)[0] if state.job and state.goes_on]
    if active:
        raise UserError(
            f"{folder.path}: {active[0].name}{', ...' if len(active) > 1 else ''} was submitted to Slurm and is "
            f"{active[0].state} (job {active[0].job}); let the study end there, or scancel its jobs"
        )


def refuse(folder: Path, run: ImpossibleRun) -> None:
    """Give an impossible run a folder that says why it is one; a folder that says so already stays as it is."""
    status = read_status(folder)
    reason = f"impossible: {run.reason}"
    if status is None or (status.state, status.reason) != ("failed", reason):
        write_status(folder, "failed", reason=reason)


def is_done(folder: Path) -> bool:
    """Whether a run's folder holds a finished run; that it is the run meant is the claim's part."""
    status = read_status(folder)
    return status is not None and status.state == "done"


def _run_pending(
    runs: Sequence[PlannedRun], pending: Sequence[PlannedRun], plan: Plan, folder: StudyFolder, quiet: bool
) -> int:
    cost = {row.name: row.own_flops for row in plan.rows}
    time = {row.name: row.seconds for row in plan.rows}
    left = sum(time[run.name] for run in pending) / plan.workers
    if not quiet:
        note(f"{len(pending)} of {len(plan.rows)} runs to do, {plan.workers} at a time, about {duration(left)}")
    from ..training.warm import import_all

    import_all()
    tokens = _prepare_data(runs, quiet)
    for warning in text_warnings(plan, runs, tokens):
        note(f"warning: {warning}")
    from .pool import Job, run_all

    jobs = [Job(run.config, folder.run(run.name), cost[run.name], run.trunk) for run in pending]
    with _watcher(len(jobs), sum(job.cost for job in jobs)) as watcher:
        outcomes = run_all(jobs, plan.workers, watcher)
    codes = [outcome.code for outcome in outcomes]
    if len(outcomes) < len(jobs) or EXIT_STOPPED in codes:
        return EXIT_STOPPED
    return EXIT_DONE if all(code == EXIT_DONE for code in codes) else EXIT_FAILED


def _prepare_data(runs: Sequence[PlannedRun], quiet: bool) -> dict[str, int]:
    """Once for each data section, before anything forks: children find it ready. Unique tokens by section."""
    import torch

    from .. import data

    torch.set_num_threads(1)  # a pool of threads would not survive the fork
    sections = {run.config.data.model_dump_json(): run.config.data for run in runs}
    return {key: data.prepare(config, progress=not quiet).train_tokens for key, config in sections.items()}


def _watcher(total: int, cost: float) -> AbstractContextManager[Any]:
    from .watch import Lines, LiveTable

    return LiveTable(total, cost) if sys.stderr.isatty() else Lines(total, cost)
