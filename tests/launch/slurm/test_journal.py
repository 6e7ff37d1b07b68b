"""The study's journal: what was submitted as what, whatever died in between."""

from pathlib import Path

from moescale.launch.slurm.commands import Element
from moescale.launch.slurm.journal import Journal, Owner
from moescale.launch.slurm.shapes import Batch, Shape
from moescale.launch.slurm.states import Slurm, owners, with_jobs

SHAPE = Shape(1, 1, 1, 2048, 0, 60)


def asked(journal: Journal, tag: str, *runs: str) -> None:
    journal.submitting(tag, Path("slurm/001/runs-1.sbatch"), "cpu", Batch("runs-1", SHAPE, runs), 2)


def test_the_last_submission_owns_a_run(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    assert (journal.batches(), journal.world()) == ([], None)
    asked(journal, "t1", "a", "b")
    journal.submitted("t1", 7)
    asked(journal, "t2", "b")
    journal.submitted("t2", 9)
    asked(journal, "t3", "a")
    journal.refused("t3", "no such account")
    assert owners(journal.batches()) == {"a": Owner(7, 0, 2048), "b": Owner(9, 0, 2048)}
    assert journal.world() == 2


def test_a_job_that_nobody_noted_is_found_by_its_comment(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    asked(journal, "t1", "a", "b")
    with (tmp_path / "journal.jsonl").open("a") as file:
        file.write('{"kind": "submitted", "tag": "t1", "jo')  # killed here
    assert owners(journal.batches()) == {}
    found = [Element(12, 1, "PENDING", "Priority", "", "t1"), Element(13, 0, "RUNNING", "", "n1", "somebody's")]
    assert owners(with_jobs(journal.batches(), found)) == {"a": Owner(12, 0, 2048), "b": Owner(12, 1, 2048)}
    assert owners(with_jobs(journal.batches(), [])) == {}
    asked(journal, "t2", "a")  # the half line does not swallow the next one
    journal.submitted("t2", 14)
    assert owners(journal.batches()) == {"a": Owner(14, 0, 2048)}


def test_slurm_tells_what_goes_on(tmp_path: Path) -> None:
    over = Element(7, 0, "CANCELLED", "", "", "t")
    slurm = Slurm({(7, 0): over, (7, 1): Element(7, 1, "COMPLETING", "", "n", "t")}, {(3, 0): "NODE_FAIL"})
    assert slurm.active(Owner(7, 0, 1)) is None
    assert slurm.active(Owner(7, 1, 1)) is not None
    assert [slurm.verdict(Owner(job, 0, 1)) for job in (7, 3, 4)] == ["CANCELLED", "NODE_FAIL", ""]
