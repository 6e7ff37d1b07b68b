"""``study submit`` and ``study resubmit``: which runs, in which arrays, with which scripts; then Slurm is asked."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ... import data
from ...base.errors import UserError
from ...base.files import digest, write_atomically
from ...training.config import CONFIG
from ...training.status import read_status, write_status
from ..cluster_config import ClusterConfig, load_cluster
from ..planned import Plan, PlannedRun
from ..study_folder import StudyFolder
from . import commands
from .journal import Journal
from .scripts import Place, prepare_script, report_script, runs_script
from .shapes import Batch, batches_of

CLUSTER = Path("slurm") / "cluster.yaml"


@dataclass(frozen=True)
class Script:
    """A script to be submitted; ``after``: conditions and labels of other scripts; no ``batch``: it serves all runs."""

    label: str
    text: str
    after: tuple[tuple[str, str], ...] = ()
    batch: Batch | None = None


@dataclass(frozen=True)
class Submission:
    """Scripts of one call, in the order in which Slurm gets them. ``logs`` is relative to the study's folder."""

    place: Place
    scripts: tuple[Script, ...]
    runs: tuple[PlannedRun, ...]
    world: int | None
    warnings: tuple[str, ...]

    def path(self, script: Script) -> Path:
        """Where a script is written, relative to the study's folder."""
        return Path(self.place.logs) / f"{script.label}.sbatch"

    def command(self, script: Script, jobs: Mapping[str, int]) -> list[str]:
        """How a script is submitted; jobs that have no id yet are named by their labels."""
        after = [f"{condition}:{jobs.get(label, label)}" for condition, label in script.after]
        return commands.submit_command(self.path(script), self.place.study, after)

    def as_json(self, jobs: Mapping[str, int]) -> dict[str, Any]:
        return {
            "folder": str(self.place.study),
            "cluster": self.place.cluster.name,
            "submitted": len(jobs) == len(self.scripts),
            "scripts": [
                {
                    "name": script.label,
                    "path": str(self.path(script)),
                    "command": self.command(script, jobs),
                    "runs": list(script.batch.runs) if script.batch else [],
                    "job": jobs.get(script.label),
                    "text": script.text,
                }
                for script in self.scripts
            ],
            "warnings": list(self.warnings),
        }


def compose(
    folder: StudyFolder,
    name: str,
    plan: Plan,
    runs: Sequence[PlannedRun],
    cluster: ClusterConfig,
    world: int | None,
    least_mb: Mapping[str, int],
) -> Submission:
    """The scripts for ``runs``, which are among the plan's. Nothing is written.

    Raises:
        UserError: runs do not fit the cluster.
    """
    path = folder.path.resolve()
    number = 1 + max((int(entry.name) for entry in (path / "slurm").glob("[0-9]*") if entry.name.isdigit()), default=0)
    tag = f"moescale:{name}:{digest(str(path))[:8]}:{number:03d}"
    place = Place(name, path, Path.cwd(), sys.executable, tag, f"slurm/{number:03d}", cluster)
    batches = batches_of(runs, plan.rows, cluster, least_mb)
    scripts = []
    unprepared = _one_of_each_section(runs)
    if unprepared:
        scripts.append(Script("prepare", prepare_script(place, unprepared)))
    ready = (("afterok", "prepare"),) if unprepared else ()
    for batch in batches:
        after = (*ready, *(("afterany", label) for label in batch.after))
        scripts.append(Script(batch.name, runs_script(place, batch), after, batch))
    if batches:
        scripts.append(Script("report", report_script(place), tuple(("afterany", batch.name) for batch in batches)))
    return Submission(place, tuple(scripts), tuple(runs), world, tuple(_warnings(runs)))


def _one_of_each_section(runs: Sequence[PlannedRun]) -> list[str]:
    """A run of each data section that is not prepared yet."""
    first = {run.config.data.model_dump_json(): run for run in reversed(runs)}
    return sorted(run.name for run in first.values() if data.find_prepared(run.config.data) is None)


def _warnings(runs: Sequence[PlannedRun]) -> list[str]:
    unsaved = [run.name for run in runs if run.config.checkpoint.every == 0]
    if not unsaved:
        return []
    return [
        f"checkpoint.every is 0 in {len(unsaved)} runs ({unsaved[0]}{', ...' if len(unsaved) > 1 else ''}): they save "
        "before a time limit or a preemption, but lose everything when a node fails; set run.checkpoint.every"
    ]


def submit(submission: Submission, folder: StudyFolder) -> dict[str, int]:
    """Write the scripts, have Slurm check all of them, then submit them; returns job ids by label.

    The caller holds the folder's lock and has claimed it.

    Raises:
        UserError: Slurm refused a script. If that was found in the check, nothing was submitted.
    """
    place, journal = submission.place, Journal(folder.path)
    for script in submission.scripts:
        write_atomically(place.study / submission.path(script), script.text)
    cluster = yaml.safe_dump(place.cluster.model_dump(mode="json"), sort_keys=False)
    write_atomically(place.study / CLUSTER, cluster)
    for script in submission.scripts:
        commands.check(submission.path(script), place.study)
    for run in submission.runs:
        _make_ready(folder.run(run.name), run)
    jobs: dict[str, int] = {}
    for script in submission.scripts:
        tag = f"{place.tag}/{script.label}"
        journal.submitting(tag, submission.path(script), place.cluster.name, script.batch, submission.world)
        after = [f"{condition}:{jobs[label]}" for condition, label in script.after]
        try:
            jobs[script.label] = commands.submit(submission.path(script), place.study, after)
        except UserError as error:
            journal.refused(tag, str(error))
            before = ", ".join(jobs) or "nothing"
            raise UserError(f"{error}; {before} was submitted before: study status shows it") from None
        journal.submitted(tag, jobs[script.label])
    return jobs


def _make_ready(folder: Path, run: PlannedRun) -> None:
    """Give a run its folder: its configuration, and a status that says it is to be done.

    What was begun elsewhere goes on in the layout chosen here; the caller's claim saw to it that it is the same run.
    """
    write_atomically(folder / CONFIG, yaml.safe_dump(run.config.model_dump(mode="json"), sort_keys=False))
    status = read_status(folder)
    step, total, attempt = (status.step, status.steps_total, status.attempt) if status else (0, 0, 0)
    write_status(folder, "pending", reason="submitted", step=step, steps_total=total, attempt=attempt)


def cluster_of(folder: StudyFolder) -> ClusterConfig | None:
    """The cluster that the study was last submitted to; None if it never was."""
    path = folder.path / CLUSTER
    return load_cluster(path) if path.is_file() else None
