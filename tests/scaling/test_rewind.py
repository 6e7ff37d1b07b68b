"""Rewinding: exactly one step line for every step, and nothing lost, whenever the process is killed."""

import json
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moescale.base.errors import UserError
from moescale.scaling.record import RecordWriter, read_record, rewind


def attempt(folder: Path, lines: SimpleNamespace, number: int, first: int, last: int) -> None:
    """An attempt that writes steps ``first`` to ``last`` with an evaluation at each even one."""
    writer = RecordWriter(folder)
    writer.header(lines.header(attempt=number, resumed_from=first - 1 or None))
    for step in range(first, last + 1):
        writer.step(lines.step(step, 3 + 0.001 * number, seconds=number + step / 1000))
        if step % 2 == 0:
            writer.eval(lines.evaluation(step, 3 + 0.001 * number))
    writer.event("saved", last, "made up")
    writer.close()


def rewound(folder: Path) -> list[dict[str, object]]:
    path = folder / "record.rewound.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_lines_beyond_the_checkpoint_move_with_their_attempt(tmp_path: Path, lines: SimpleNamespace) -> None:
    attempt(tmp_path, lines, 1, 1, 10)
    rewind(tmp_path, 6, 2)
    attempt(tmp_path, lines, 2, 7, 9)
    rewind(tmp_path, 4, 3)
    record = read_record(tmp_path)
    assert [step["step"] for step in record.steps] == [1, 2, 3, 4]
    assert [line["step"] for line in record.evals] == [2, 4]
    assert [header["attempt"] for header in record.headers] == [1, 2]
    assert len(record.events) == 2
    moved = [(m["kind"], m["step"], m["attempt"], m["rewound_by"]) for m in rewound(tmp_path) if m["kind"] == "step"]
    first = [("step", step, 1, 2) for step in (7, 8, 9, 10)]
    second = [("step", step, 1, 3) for step in (5, 6)] + [("step", step, 2, 3) for step in (7, 8, 9)]
    assert moved == first + second


def test_from_nothing_everything_moves(tmp_path: Path, lines: SimpleNamespace) -> None:
    rewind(tmp_path, 0, 1)
    attempt(tmp_path, lines, 1, 1, 3)
    rewind(tmp_path, 0, 2)
    record = read_record(tmp_path)
    assert (record.steps, record.evals, len(record.headers)) == ([], [], 1)
    assert Counter(str(m["kind"]) for m in rewound(tmp_path)) == {"step": 3, "eval": 1}


def test_killed_between_the_two_files_nothing_is_lost_or_doubled(tmp_path: Path, lines: SimpleNamespace) -> None:
    attempt(tmp_path, lines, 1, 1, 10)
    before = (tmp_path / "record.jsonl").read_bytes()
    rewind(tmp_path, 4, 2)
    after = (tmp_path / "record.jsonl").read_bytes()
    moved = rewound(tmp_path)
    (tmp_path / "record.jsonl").write_bytes(before)  # as if the second renaming had not happened
    rewind(tmp_path, 4, 3)
    assert (tmp_path / "record.jsonl").read_bytes() == after
    assert rewound(tmp_path) == moved


def test_rewinding_twice_changes_nothing(tmp_path: Path, lines: SimpleNamespace) -> None:
    attempt(tmp_path, lines, 1, 1, 5)
    rewind(tmp_path, 3, 2)
    stamp = (tmp_path / "record.jsonl").stat().st_mtime_ns
    rewind(tmp_path, 3, 3)
    assert (tmp_path / "record.jsonl").stat().st_mtime_ns == stamp


def test_a_record_that_lacks_steps_of_the_checkpoint_is_refused(tmp_path: Path, lines: SimpleNamespace) -> None:
    attempt(tmp_path, lines, 1, 1, 5)
    with pytest.raises(UserError, match=r"step before the checkpoint is 5.*step 8"):
        rewind(tmp_path, 8, 2)


@settings(max_examples=60, deadline=None)
@given(history=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 100), st.integers(0, 80)), min_size=1, max_size=6))
def test_any_history_of_kills_leaves_one_line_a_step_and_loses_none(history: list[tuple[int, int, int]]) -> None:
    """Each attempt does some steps, is killed with a torn line, and resumes from a checkpoint somewhere before."""
    folder = Path(tempfile.mkdtemp())
    lines = SimpleNamespace(
        header=lambda **more: {"run": "r", **more},
        step=lambda step, loss, **more: {"step": step, "loss": loss, **more},
        evaluation=lambda step, loss: {"step": step, "domain": "held_out", "loss": loss},
    )
    written: Counter[tuple[int, int]] = Counter()
    done = 0
    for number, (steps, resume, torn) in enumerate(history, start=1):
        checkpoint = done * resume // 100
        rewind(folder, checkpoint, number)
        if torn % 3 == 0 and (folder / "record.jsonl").exists():
            rewind(folder, checkpoint, number + 100)
        attempt(folder, lines, number, checkpoint + 1, checkpoint + steps)
        done = checkpoint + steps
        written.update((number, step) for step in range(checkpoint + 1, done + 1))
        with (folder / "record.jsonl").open("ab") as file:
            file.write(b'{"kind":"step","step":' + b"1" * (torn % 5))
    rewind(folder, done, len(history) + 1)
    record = read_record(folder)
    assert [step["step"] for step in record.steps] == list(range(1, done + 1))
    kept = Counter((int(step["seconds"]), step["step"]) for step in record.steps)
    gone = Counter((m["attempt"], m["step"]) for m in rewound(folder) if m["kind"] == "step")
    assert kept + gone == written
    shutil.rmtree(folder)
