"""The record: golden file, writing, reading, comparing."""

import copy
import json
import math
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from moescale.base.errors import UserError
from moescale.scaling.record import RecordWriter, encode_line, read_record, same

GOLDEN = Path(__file__).parent / "data" / "record_v1.jsonl"


def test_golden_file_reads_strictly_and_is_written_byte_for_byte(tmp_path: Path) -> None:
    record = read_record(GOLDEN, strict=True)
    assert [len(lines) for lines in (record.headers, record.steps, record.evals, record.events)] == [2, 3, 3, 2]
    assert record.end is not None
    assert record.end["state"] == "done"
    writer = RecordWriter(tmp_path)
    for raw in GOLDEN.read_text().splitlines():
        line = json.loads(raw)
        kind = line.pop("kind")
        line.pop("schema", None)
        if kind == "event":
            writer.event(**line)
        else:
            getattr(writer, kind)(line)
    writer.close()
    assert (tmp_path / "record.jsonl").read_bytes() == GOLDEN.read_bytes()


def test_floats_survive_to_the_last_bit_and_non_finite_ones_become_null(tmp_path: Path, lines: SimpleNamespace) -> None:
    writer = RecordWriter(tmp_path)
    writer.header(lines.header())
    writer.step(lines.step(1, 0.1 + 0.2))
    writer.step(lines.step(2, math.nan, grad_norm={"total": math.inf, "dense": -math.inf, "expert": None}))
    writer.close()
    record = read_record(tmp_path, strict=True)
    assert record.steps[0]["loss"] == 0.1 + 0.2
    assert record.steps[1]["loss"] is None
    assert record.steps[1]["grad_norm"] == {"total": None, "dense": None, "expert": None}
    assert "NaN" not in (tmp_path / "record.jsonl").read_text()


def test_each_line_is_readable_as_soon_as_it_is_written(tmp_path: Path, lines: SimpleNamespace) -> None:
    writer = RecordWriter(tmp_path)
    writer.header(lines.header())
    for number in range(1, 4):
        writer.step(lines.step(number))
        assert read_record(tmp_path).last_step == number
    writer.close()


def test_a_step_line_costs_little(tmp_path: Path, lines: SimpleNamespace) -> None:
    load = {"max_violation": 0.7, "cv": 0.3, "entropy": 2.0, "dropped": 0.0, "dead": 0.0, "p95_load": 1.5}
    content = lines.step(1, 3.141592653589793, router=[{"layer": i, **load} for i in range(4)])
    writer = RecordWriter(tmp_path)
    best = math.inf
    for _ in range(20):
        begin = time.perf_counter()
        for _ in range(50):
            writer.step(content)
        best = min(best, (time.perf_counter() - begin) / 50)
    writer.close()
    assert best < 100e-6


def write(folder: Path, *contents: dict[str, object] | bytes) -> Path:
    path = folder / "record.jsonl"
    path.write_bytes(b"".join(c if isinstance(c, bytes) else encode_line(c) for c in contents))
    return path


def test_a_torn_last_line_is_left_out(tmp_path: Path, lines: SimpleNamespace) -> None:
    head = {"kind": "header", "schema": 1, **lines.header()}
    path = write(
        tmp_path, head, {"kind": "step", **lines.step(1)}, encode_line({"kind": "step", **lines.step(2)})[:-20]
    )
    assert read_record(path).last_step == 1
    with pytest.raises(ValueError, match="rewind"):
        RecordWriter(tmp_path)


@pytest.mark.parametrize("brief", [False, True])
def test_damage_is_refused_with_its_line_number(brief: bool, tmp_path: Path, lines: SimpleNamespace) -> None:
    head = {"kind": "header", "schema": 1, **lines.header()}
    one, three = ({"kind": "step", **lines.step(number)} for number in (1, 3))
    cases = {
        "line 2: not valid JSON": (head, b'{"kind": "st\n', one),
        "line 2: not valid JSON: .*invalid character": (head, b'{"kind":"step","step":1,"loss":NaN}\n'),
        "line 2: not valid JSON: .*utf-8": (head, b'{"kind":"\xff"}\n'),
        "line 2: not valid JSON: .*recursion": (head, b"[" * 10_000 + b"]" * 10_000 + b"\n"),
        "line 2: kind 'stop'": (head, {"kind": "stop"}),
        "line 2: kind None": (head, b"[1]\n"),
        "line 1: a record starts with a header": (one,),
        "line 3: step 3 follows step 1": (head, one, three),
        "line 3: step 1 follows step 1": (head, one, one),
        "line 1: schema 2": ({**head, "schema": 2},),
        "line 2: step.step is missing": (head, {"kind": "step"}),
        "line 2: step.step is .*no whole number": (head, {**one, "step": 1.5}),
    }
    for message, contents in cases.items():
        with pytest.raises(UserError, match=message):
            read_record(write(tmp_path, *contents), brief=brief)
    with pytest.raises(UserError, match="cannot be read"):
        read_record(tmp_path / "nowhere")


def test_a_brief_reading_has_a_part_of_the_same(tmp_path: Path, lines: SimpleNamespace) -> None:
    whole, brief = read_record(GOLDEN), read_record(GOLDEN, brief=True)
    assert (brief.headers, brief.evals, brief.events, brief.end) == (
        whole.headers, whole.evals, whole.events, whole.end
    )  # fmt: skip
    assert [{key: step[key] for key in short} for step, short in zip(whole.steps, brief.steps, strict=True)] == (
        brief.steps
    )
    assert {*whole.steps[0]} - {*brief.steps[0]} >= {"router", "grad_norm"}
    head, step = ({"kind": "header", "schema": 1, **lines.header()}, {"kind": "step", **lines.step(1)})
    for other in ({**step, "loss": "3.0"}, dict(reversed(step.items()))):  # no line of `RecordWriter`'s: read whole
        assert read_record(write(tmp_path, head, other), brief=True).steps == [other]


def test_strict_reading_names_the_field(tmp_path: Path, lines: SimpleNamespace) -> None:
    head = {"kind": "header", "schema": 1, **lines.header()}
    for change in ({"loss": "3.0"}, {"lossy": 3.0}):
        path = write(tmp_path, head, {"kind": "step", **lines.step(1), **change})
        read_record(path)
        with pytest.raises(UserError, match=f"line 2: step.{next(iter(change))}"):
            read_record(path, strict=True)


def test_a_new_header_takes_the_end_of_the_attempt_before(tmp_path: Path, lines: SimpleNamespace) -> None:
    head = {"kind": "header", "schema": 1, **lines.header()}
    end = {"kind": "end", **lines.ending(0, "preempted", "time limit")}
    assert read_record(write(tmp_path, head, end)).end == end
    assert read_record(write(tmp_path, head, end, {**head, "attempt": 2})).end is None


def test_same_sees_what_counts_and_only_that() -> None:
    record = read_record(GOLDEN)
    other = copy.deepcopy(record)
    other.headers.clear()
    other.events.clear()
    for line in other.steps:
        line.update(seconds=9.0, tokens_per_second=1.0, tflops=1.0, mfu=0.5, memory_bytes=1)
    assert other.end is not None
    other.end["why"] = "otherwise"
    other.end["totals"]["seconds"] = 99.0
    assert same(record, other) == []

    other.steps[1]["loss"] = math.nextafter(record.steps[1]["loss"], 9)
    other.steps[2]["router"][0]["dead"] = 0.5
    other.evals[0]["domain"] = "elsewhere"
    other.end["totals"]["tokens"] += 1
    found = "\n".join(same(record, other))
    for part in ("step 2 loss", "step 3 router[0] dead", "eval 3 held_out", "eval 3 elsewhere", "end totals tokens"):
        assert part in found
    other.steps.pop()
    assert any(text.startswith("step 3:") for text in same(record, other))
