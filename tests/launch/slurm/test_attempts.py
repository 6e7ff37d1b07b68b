"""When a run is started again, and when it is not."""

from pathlib import Path

import pytest

from moescale.checkpoint.storage import folder_of
from moescale.launch.slurm.attempts import Attempts, Outcome, Policy, saved_so_far

POLICY = Policy(restarts=2, memory=1, nonfinite=0)


def history(folder: Path, *ends: tuple[str, Outcome | None], batch: str = "b") -> Attempts:
    """Starts, each with the checkpoint it went on from and how it ended (None: nobody knows)."""
    attempts = Attempts(folder)
    for saved, outcome in ends:
        attempts.start(batch, "1_0", "host", saved)
        if outcome is not None:
            attempts.end(outcome, f"why {outcome}", saved)
    return Attempts(folder)  # as the next start reads it


def test_the_latest_checkpoint_is_found_by_its_name(tmp_path: Path) -> None:
    assert saved_so_far(tmp_path) == ""
    for step in (90, 100, 9):
        folder_of(tmp_path / "checkpoints", step).mkdir(parents=True)
    (tmp_path / "checkpoints" / ".step-00000200.abc.tmp").mkdir()  # being written
    assert saved_so_far(tmp_path) == folder_of(tmp_path / "checkpoints", 100).name


@pytest.mark.parametrize("outcome", ["stopped", "crash", None])
def test_starts_that_save_nothing_are_counted(outcome: Outcome | None, tmp_path: Path) -> None:
    assert history(tmp_path, *[("", outcome)] * 2).objection("b", "", POLICY) == ""
    objection = history(tmp_path, ("", outcome)).objection("b", "", POLICY)
    assert objection.startswith("3 starts in a row saved nothing at all")
    assert outcome is None or f"why {outcome}" in objection


def test_progress_clears_the_count(tmp_path: Path) -> None:
    attempts = history(tmp_path, ("", "crash"), ("", "crash"), ("step-1", "crash"), ("step-1", "crash"))
    assert attempts.objection("b", "step-1", POLICY) == ""
    assert attempts.objection("b", "step-2", POLICY) == ""
    assert "beyond step-1" in history(tmp_path, ("step-1", "crash")).objection("b", "step-1", POLICY)


def test_a_new_submission_counts_anew(tmp_path: Path) -> None:
    attempts = history(tmp_path, *[("", "crash")] * 3)
    assert attempts.objection("b", "", POLICY) != ""
    assert attempts.objection("another", "", POLICY) == ""


@pytest.mark.parametrize(
    ("outcome", "allowed"), [("memory", 1), ("nonfinite", 0), ("input", 0), ("crash", 2), ("cancelled", 2)]
)
def test_each_kind_of_failure_has_its_policy(outcome: Outcome, allowed: int, tmp_path: Path) -> None:
    for count in range(1, allowed + 2):
        attempts = history(tmp_path, ("", outcome))
        assert (attempts.objection("b", "", POLICY) == "") == (count <= allowed)
    assert f"why {outcome}" in attempts.objection("b", "", POLICY)


def test_the_last_start_owns_the_run_and_half_a_line_is_passed_over(tmp_path: Path) -> None:
    attempts = Attempts(tmp_path)
    first = attempts.start("b", "1_0", "host", "")
    assert attempts.owns(first)
    with (tmp_path / "attempts.jsonl").open("a") as file:
        file.write('{"kind": "end", "outc')
    second = Attempts(tmp_path).start("b", "1_0", "other", "")
    assert (first.number, second.number) == (1, 2)
    assert not attempts.owns(first)
