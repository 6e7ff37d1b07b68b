"""How far each run of a study is: what it says itself, joined with what Slurm says of its job. Works without Slurm."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ...base.errors import UserError
from ...training.status import Status, current_status, read_status
from ..ends import latest_line, log_tail
from ..planned import ImpossibleRun, PlannedRun
from ..study_folder import StudyFolder
from . import commands
from .journal import Journal, Owner, Submitted, owners
from .traces import last_start, verdict_in_logs

# `waiting`: a job of Slurm waits for its turn. `lost`: what did the run is gone, and nothing will go on with it.
State = Literal["pending", "waiting", "running", "done", "preempted", "failed", "lost"]


@dataclass(frozen=True)
class RunState:
    """One run.

    Attributes:
        left: seconds to go, by the last step.
        job: the element of Slurm's array, as squeue names it; ``memory_mb``: what it was given on each node, MiB.
    """

    name: str
    state: State
    step: int = 0
    steps_total: int = 0
    attempt: int = 0
    loss: float | None = None
    left: float | None = None
    job: str = ""
    memory_mb: int = 0
    nodes: str = ""
    reason: str = ""
    log_tail: tuple[str, ...] = ()
    impossible: bool = False

    @property
    def goes_on(self) -> bool:
        """Whether it may change without anybody's doing."""
        return self.state in ("waiting", "running") or (self.state == "preempted" and bool(self.job))

    @property
    def to_submit(self) -> bool:
        """Whether it is to be done and was never submitted."""
        return not self.job and self.state not in ("done", "running") and not self.impossible

    @property
    def to_resubmit(self) -> bool:
        """Whether it ended without being done, and nobody will start it again."""
        return self.state in ("failed", "lost") and not self.impossible


@dataclass(frozen=True)
class Slurm:
    """What Slurm says of a study's jobs; ``elements`` None: nobody knows."""

    elements: dict[tuple[int, int], commands.Element] | None
    ended: dict[tuple[int, int], str]

    def active(self, owner: Owner | None) -> commands.Element | None:
        """The run's element if it waits or runs."""
        found = self.elements.get((owner.job, owner.index)) if self.elements is not None and owner else None
        return found if found is not None and not found.over else None

    def verdict(self, owner: Owner) -> str:
        """What became of an element that is over, as far as Slurm remembers."""
        found = (self.elements or {}).get((owner.job, owner.index))
        return found.state if found is not None else self.ended.get((owner.job, owner.index), "")


NO_SLURM = Slurm(None, {})


def with_jobs(batches: Sequence[Submitted], found: Sequence[commands.Element]) -> list[Submitted]:
    """``batches`` with the jobs that Slurm took but nobody noted: their comments tell."""
    noted = {element.comment: element.job for element in found}
    return [batch if batch.job is not None else replace(batch, job=noted.get(batch.tag)) for batch in batches]


def ask_slurm(batches: Sequence[Submitted]) -> tuple[Slurm, list[Submitted]]:
    """What Slurm says, and `with_jobs`.

    Raises:
        UserError: Slurm does not answer.
    """
    found = commands.elements()
    known = with_jobs(batches, found)
    elements = {(element.job, element.index): element for element in found}
    forgotten = {batch.job for batch in known if batch.job is not None} - {job for job, _ in elements}
    return Slurm(elements, commands.ended(forgotten)), known


def study_states(folder: StudyFolder, runs: Sequence[PlannedRun | ImpossibleRun]) -> tuple[list[RunState], list[str]]:
    """State of each of ``runs``, and warnings about what could not be found out."""
    slurm, batches, warnings = NO_SLURM, Journal(folder.path).batches(), []
    if batches and commands.is_installed():
        try:
            slurm, batches = ask_slurm(batches)
        except UserError as error:
            warnings.append(f"states are what runs said last: {error}")
    elif batches:
        warnings.append("submitted to Slurm, which is not on this machine: states are what runs said last")
    owned = owners(batches)
    states = [run_state(run, folder.run(run.name), owned.get(run.name), slurm) for run in runs]
    return states, warnings


def run_state(run: PlannedRun | ImpossibleRun, folder: Path, owner: Owner | None, slurm: Slurm) -> RunState:
    """State of one run; ``owner``: what it was submitted as, if it ever was."""
    # Where Slurm knows of the run, it knows better than locks and clocks whether its processes live.
    status = read_status(folder) if owner and slurm.elements is not None else current_status(folder)
    element = slurm.active(owner)
    state, reason = _joined(status, element, owner, slurm)
    if state == "lost" and owner is not None:
        reason = _account(folder, owner, slurm, reason)
    step, total = (status.step, status.steps_total) if status else (0, 0)
    line = latest_line(folder, "step") if state in ("running", "preempted", "lost") else None
    if line is not None:
        step = max(step, line["step"])
    return RunState(
        name=run.name,
        state=state,
        step=step,
        steps_total=total,
        attempt=status.attempt if status else 0,
        loss=line.get("loss") if line else None,
        left=(total - step) * line["seconds"] if line and state == "running" else None,
        job=f"{owner.job}_{owner.index}" if owner else "",
        memory_mb=owner.memory_mb if owner else 0,
        nodes=element.nodes if element else "",
        reason=reason,
        log_tail=log_tail(folder) if state in ("failed", "lost") else (),
        impossible=isinstance(run, ImpossibleRun),
    )


def _joined(
    status: Status | None, element: commands.Element | None, owner: Owner | None, slurm: Slurm
) -> tuple[State, str]:
    """State and reason from both sides."""
    said = status.state if status else "pending"
    reason = (status.reason or "") if status else ""
    if said == "done" or owner is None or slurm.elements is None:
        return said, reason
    if element is not None and element.waits:
        waits = f"waits: {element.reason}" if element.reason not in ("", "None") else ""
        return ("preempted", reason) if said == "preempted" else ("waiting", waits)
    if element is not None:
        return "running", ""
    if said == "failed":
        return said, reason
    return "lost", reason


def _account(folder: Path, owner: Owner, slurm: Slurm, said: str) -> str:
    """How a lost run was lost: by Slurm, else by what its job left in the study's folder."""
    study = folder.parent.parent
    verdict = slurm.verdict(owner) or verdict_in_logs(study, owner.job, owner.index) or "Slurm has forgotten it"
    parts = [f"its job {owner.job}_{owner.index} is over: {verdict}", last_start(folder), said]
    return "; ".join(filter(None, parts))
