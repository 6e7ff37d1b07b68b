"""Downstream scores: what is collected from records, compared at equal loss, and shown."""

import csv
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moescale.scaling.analysis import analyse
from moescale.scaling.downstream import answered, gaps_at_loss, write_answered
from moescale.scaling.downstream_report import blocks, scores
from moescale.scaling.findings import findings
from moescale.scaling.record import Record
from moescale.scaling.report import sections

TASK = {"hash": "ab12cd34ef56ab78", "questions": 400, "chance": 0.25, "raw_score": 0.4, "cut": 0}


def with_task(study: SimpleNamespace, apart: dict[str, float], **changes: Any) -> dict[str, Record]:
    """The study's records with a task whose score falls with loss, and lies ``apart`` by family."""
    rng = np.random.default_rng(1)
    records = {}
    for point in study.points:
        record = study.records[point.run]
        if point.state == "done":
            score = 0.9 - 0.1 * point.loss + apart.get(point.family, 0.0) + 0.003 * rng.standard_normal()
            line = {**record.evals[-1], "domain": "go-on", "score": score, "loss": 2.0, "task": {**TASK, **changes}}
            record = replace(record, evals=[*record.evals, line, {**line, "step": 1, "score": 0.0}])
        records[point.run] = record
    return records


def test_nothing_is_shown_without_tasks(study: SimpleNamespace) -> None:
    assert answered(study.points, study.records) == []
    assert scores([]) is None


def test_final_scores_of_finished_runs_are_collected(study: SimpleNamespace, tmp_path: Path) -> None:
    records = with_task(study, {})
    points = [replace(point, check="lr") if i == 0 else point for i, point in enumerate(study.points)]
    found = answered(points, records)
    assert {one.point.run for one in found} == {p.run for p in points[1:] if p.state == "done"}
    one = found[0]
    assert one.error == pytest.approx(math.sqrt(one.score * (1 - one.score) / 400))
    assert one.above_chance == (one.score > 0.25 + 2 * math.sqrt(0.25 * 0.75 / 400))
    write_answered(tmp_path / "downstream.csv", found)
    rows = list(csv.DictReader((tmp_path / "downstream.csv").open()))
    assert len(rows) == len(found)
    assert float(rows[0]["score"]) == one.score
    assert float(rows[0]["loss"]) == one.point.loss
    assert (rows[0]["task"], rows[0]["hash"], rows[0]["questions"]) == ("go-on", TASK["hash"], "400")


def test_a_gap_at_equal_loss_is_found_where_there_is_one(study: SimpleNamespace) -> None:
    gaps = {gap.family: gap for gap in gaps_at_loss(answered(study.points, with_task(study, {"E8G4": 0.02})))}
    assert gaps["E8G4"].apart.value == pytest.approx(0.02, abs=0.004)
    assert gaps["E8G4"].resolved
    assert abs(gaps["E8G2"].apart.value) < 0.004
    assert gaps["E8G2"].apart.reach < 0.01


def test_other_questions_under_one_name_are_kept_apart(study: SimpleNamespace) -> None:
    first, second = with_task(study, {}), with_task(study, {}, hash="ffff000000000000")
    mixed = {p.run: (first if p.family == "dense" else second)[p.run] for p in study.points}
    found = answered(study.points, mixed)
    assert {one.task for one in found} == {"go-on (ab12cd)", "go-on (ffff00)"}
    assert gaps_at_loss(found) == []


def test_the_section_and_the_finding(study: SimpleNamespace) -> None:
    found = analyse(study.points, with_task(study, {"E8G4": 0.02}), {})
    shown = {section.key: section for section in sections(found, {}, [])}
    plot = scores(found.answered)
    assert plot is not None
    assert plot.image.startswith("data:image/svg+xml")
    assert len(plot.rows) == len(found.answered)
    assert all(len(row) == len(plot.columns) for row in plot.rows)
    assert len(shown["downstream"].blocks) == 2
    (sentences,) = blocks(found)
    assert f"go-on: {len(found.answered)} of {len(found.answered)} runs above chance" in sentences.texts[0]
    finding = next(text for text in findings(found) if text.startswith("Downstream task go-on"))
    assert "E8G2 minus dense" in finding
    assert any("E8G4 minus dense is +0.0" in text and text.endswith("resolved.") for text in findings(found))
    # A task's bits per byte are those of its right choices, not of plain text.
    assert not any("go-on" in cell for row in shown["domains"].blocks[0].plot.rows for cell in row)
