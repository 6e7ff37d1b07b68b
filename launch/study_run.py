"""``study run``: what is not done yet, side by side, then points, fits and report."""

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from ..base.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, UserError
from ..base.progress import duration
from ..training.status import read_status
from .environment import world_of_launcher
from .expansion import PlannedRun
from .output import note
from .plan import Plan, plan_runs, repeated_text
from .study_config import StudyConfig
from .study_folder import StudyFolder


def run_study(study: StudyConfig, runs: Sequence[PlannedRun], folder: StudyFolder, quiet: bool) -> int:
    """Bring the study in ``folder`` to its end, or to where a stop request leaves it.

    Runs that failed are tried again: what ailed them may have been mended.

    Returns:
        Exit code: 0 all runs are done, 1 some failed, 75 stopped on request.

    Raises:
        UserError: an impossible run, or a folder that another study or configuration lives in; nothing was started.
    """
    if world_of_launcher()[1] > 1:
        raise UserError("study run starts its own processes; call it alone, not under torchrun, srun or mpirun")
    plan = plan_runs([(run.family, run.config) for run in runs], study.workers)
    with folder.locked():
        folder.claim(study, list(runs))
        pending = [run for run in runs if not is_done(folder.run(run.name))]
        if not pending:
            return EXIT_DONE
        return _run_pending(runs, pending, plan, folder, quiet)


def is_done(folder: Path) -> bool:
    """Whether a run's folder holds a finished run; that it is the run meant is the claim's part."""
    status = read_status(folder)
    return status is not None and status.state == "done"


def _run_pending(
    runs: Sequence[PlannedRun], pending: Sequence[PlannedRun], plan: Plan, folder: StudyFolder, quiet: bool
) -> int:
    cost = {row.name: row.flops for row in plan.rows}
    time = {row.name: row.seconds for row in plan.rows}
    left = sum(time[run.name] for run in pending) / plan.workers
    for warning in plan.warnings:
        note(f"warning: {warning}")
    if not quiet:
        note(f"{len(pending)} of {len(plan.rows)} runs to do, {plan.workers} at a time, about {duration(left)}")
    from ..training.warm import import_all

    import_all()
    tokens = _prepare_data(runs, quiet)
    for warning in repeated_text(plan, [run.config for run in runs], tokens):
        note(f"warning: {warning}")
    from .pool import Job, run_all

    jobs = [Job(run.config, folder.run(run.name), cost[run.name]) for run in pending]
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
