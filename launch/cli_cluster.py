"""``moescale study submit``, ``status`` and ``resubmit``: studies on a cluster, or without one."""

import shlex
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..base.errors import EXIT_DONE
from .arguments import AsJson, Overrides, StudyDirectory, StudyFile, World
from .environment import restart_with_allocator_settings
from .output import console, note, print_json, stdout_for_results

if TYPE_CHECKING:
    from .slurm.states import RunState
    from .slurm.verbs import Result
    from .study_folder import StudyFolder

Out = Annotated[Path | None, typer.Option(help="folder of the study; default: the cluster's storage, or studies/NAME")]
Cluster = Annotated[Path, typer.Option(help="a cluster file, or the name of a shipped one: clusters/cpu.yaml")]
OtherCluster = Annotated[Path | None, typer.Option(help="a cluster file; default: where the study was submitted")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="print every script and change nothing")]
Watch = Annotated[bool, typer.Option("--watch", help="show it again and again until nothing runs or waits")]
WATCH_EVERY = 5.0  # seconds


def register(study: typer.Typer) -> None:
    """Add the verbs of this file to ``moescale study``."""
    for verb in (submit, status, resubmit):
        study.command(verb.__name__)(verb)


def submit(
    file: StudyFile,
    cluster: Cluster,
    overrides: Overrides = None,
    out: Out = None,
    world: World = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Submit to Slurm what was never submitted of a study, and a job that reports afterwards."""
    from .cluster_config import load_cluster
    from .expansion import expand
    from .slurm.verbs import submit_study
    from .study_config import load_study
    from .study_folder import StudyFolder

    place = load_cluster(cluster)
    study = load_study(file, overrides)
    folder = StudyFolder(out if out is not None else (place.storage or Path("studies")) / study.name)
    _show_result(submit_study(study, expand(study), folder, place, world, dry_run), dry_run, as_json)


def resubmit(
    directory: StudyDirectory, cluster: OtherCluster = None, dry_run: DryRun = False, as_json: AsJson = False
) -> None:
    """Start the failed and lost runs of a study again: on its cluster, or here if it was never submitted."""
    from .cluster_config import load_cluster
    from .slurm.submission import cluster_of
    from .slurm.verbs import resubmit_study
    from .study_folder import StudyFolder

    folder = StudyFolder(directory)
    folder.open()
    place = load_cluster(cluster) if cluster is not None else cluster_of(folder)
    if place is None:
        _run_again(folder, dry_run, as_json)
    else:
        _show_result(resubmit_study(folder, place, dry_run), dry_run, as_json)


def status(directory: StudyDirectory, watch: Watch = False, as_json: AsJson = False) -> None:
    """Show how far each run of a study is, and why those that failed did."""
    from .slurm.states import study_states
    from .study_folder import StudyFolder
    from .tables import status_table

    folder = StudyFolder(directory)
    runs = folder.open()[1].everything
    while True:
        states, warnings = study_states(folder, runs)
        if as_json:
            print_json({"runs": [asdict(state) for state in states], "warnings": warnings})
        else:
            console().print(status_table(states))
            for warning in warnings:
                note(f"warning: {warning}")
        if not watch or not any(state.goes_on for state in states):
            return
        time.sleep(WATCH_EVERY)


def _run_again(folder: "StudyFolder", dry_run: bool, as_json: bool) -> None:
    """Without Slurm: the failed and lost runs, here and now."""
    restart_with_allocator_settings()
    from .slurm.states import study_states
    from .study_run import run_study

    study, expansion = folder.open()
    again = [state.name for state in study_states(folder, expansion.everything)[0] if state.to_resubmit]
    code = EXIT_DONE
    if again and not dry_run:
        with stdout_for_results():
            code = run_study(study, expansion, folder, quiet=as_json, only=again)
    if as_json:
        print_json({"exit_code": code, "folder": str(folder.path), "runs": again})
    else:
        note(f"{len(again)} runs to do again: {', '.join(again)}" if again else "no run failed or was lost")
    raise typer.Exit(code)


def _show_result(result: "Result", dry_run: bool, as_json: bool) -> None:
    for warning in result.warnings:
        note(f"warning: {warning}")
    submission, jobs = result.submission, result.jobs
    if as_json:
        print_json({**submission.as_json(jobs), "states": dict(Counter(state.state for state in result.states))})
        return
    for script in submission.scripts if dry_run else ():
        print(f"# ==> {submission.path(script)}: {shlex.join(submission.command(script, jobs))}")
        print(script.text)
    for line in _left_out(result.states, {run.name for run in submission.runs}):
        note(line)
    for label, job in jobs.items():
        print(f"job {job}: {label}")
    if not submission.scripts:
        note("nothing to submit")
    elif dry_run:
        note(f"{len(submission.runs)} runs would be submitted; nothing was changed")
    else:
        note(f"{len(submission.runs)} runs submitted; moescale study status {submission.place.study} shows them")


def _left_out(states: "list[RunState]", chosen: set[str]) -> list[str]:
    """What becomes of the runs that are not submitted, a line for each state."""
    rest = Counter(state.state for state in states if state.name not in chosen and not state.impossible)
    return [
        f"{count} runs left as they are: {state}"
        + ("; study resubmit starts them again" if state in ("failed", "lost") else "")
        for state, count in sorted(rest.items())
    ]
