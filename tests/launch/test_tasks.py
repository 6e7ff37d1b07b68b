"""``moescale data tasks``, and the study whose runs have such."""

import csv
import json

from moescale.data.questions import read_questions

TASKS = "eval: {tasks: {go-on: {continuations: {domain: python, count: 8, context: 20, length: 10}}}}"


def test_tasks_are_written_for_the_harness(work, main, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(f"extends: {work}/base.yaml\ntraining: {{steps: 2}}\n{TASKS}\n")
    result = main("data", "tasks", file, "--out", tmp_path / "tasks", "--json")
    assert result.returncode == 0, result.stderr
    (task,) = json.loads(result.stdout)["tasks"]
    assert (task["task"], task["questions"], task["chance"]) == ("go-on", 8, 0.25)
    assert len(read_questions("go-on", tmp_path / "tasks" / "go-on.jsonl")) == 8
    assert task["harness"] == str(tmp_path / "tasks" / "go-on.yaml")
    before = (tmp_path / "tasks" / "go-on.jsonl").read_bytes()
    said = main("data", "tasks", file, "--out", tmp_path / "tasks")
    assert said.stdout.startswith("go-on: 8 questions, 25.0% by chance: ")
    assert (tmp_path / "tasks" / "go-on.jsonl").read_bytes() == before
    refused = main("data", "tasks", file, "--out", file)
    assert (refused.returncode, refused.stderr.startswith("error: --out (")) == (2, True)


def test_a_run_without_tasks_is_told_so(work, main, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(f"extends: {work}/base.yaml\ntraining: {{steps: 2}}\n")
    result = main("data", "tasks", file, "--out", tmp_path / "tasks")
    assert result.returncode == 2
    assert "eval.tasks names no task" in result.stderr
    assert not (tmp_path / "tasks").exists()


def test_a_study_with_tasks_reports_them(work, moescale, tmp_path):
    file = tmp_path / "study.yaml"
    file.write_text(
        f"run:\n  extends: {work}/base.yaml\n  {TASKS}\n"
        "groups:\n"
        "  dense: {family: dense, grid: {training.steps: [2, 3]}}\n"
        "  sparse: {family: E4G2, set: {moe: {experts: 4, active: 2, granularity: 2}, training.steps: 2}}\n"
    )
    done = moescale("study", "run", file, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((tmp_path / "out" / "downstream.csv").open()))
    assert {row["family"] for row in rows} == {"dense", "E4G2"}
    assert {(row["task"], row["questions"], row["chance"]) for row in rows} == {("go-on", "8", "0.25")}
    assert 'id="downstream"' in (tmp_path / "out" / "report.html").read_text()
