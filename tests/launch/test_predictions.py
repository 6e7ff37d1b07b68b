"""A study whose largest runs are predicted before they are trained, and ``predict`` for runs one by one."""

import csv
import json
from pathlib import Path

import pytest

from moescale.base.errors import UserError
from moescale.launch.expansion import expand
from moescale.launch.held_out import predicted_runs
from moescale.launch.plan import plan_study
from moescale.launch.study_config import load_study
from moescale.scaling.record import read_record
from moescale.scaling.register import Register

STUDY = """
run: {{extends: {work}/base.yaml}}
workers: 2
groups:
  dense:
    family: dense
    grid: {{training.steps: [8, 12, 18, 27, 40]}}
fit:
  - {{law: power, family: dense, hold_out: "d>=800", predict: true}}
"""


@pytest.mark.distributed
def test_the_largest_runs_are_predicted_then_trained_then_compared(work, moescale, main, tmp_path):
    study, out = tmp_path / "study.yaml", tmp_path / "out"
    study.write_text(STUDY.format(work=work))
    ended = moescale("study", "run", study, "--out", out, "--json")
    assert ended.returncode == 0, ended.stderr
    largest = ["dense-d16-27steps-s0", "dense-d16-40steps-s0"]
    entries = Register(out / "predictions.jsonl").read()
    assert [entry.prediction.run for entry in entries] == largest
    for entry, name in zip(entries, largest, strict=True):
        record = read_record(out / "runs" / name)
        said = entry.prediction
        assert not entry.faults
        assert (said.steps, said.after) == (0, False)
        assert said.scientific_hash == record.headers[-1]["scientific_hash"]
        assert said.variables["c"] == record.steps[-1]["flops"]
        assert said.n_points == 3
    summary = json.loads(ended.stdout)
    assert [one["run"] for one in summary["predictions"]] == largest
    assert all(one["before"] and one["measured"] and not one["faults"] for one in summary["predictions"])
    assert any(line.startswith("Predicted before they began by power-dense: 2 runs") for line in summary["headlines"])
    with (out / "predictions.csv").open() as table:
        assert [row["when"] for row in csv.DictReader(table)] == ["before the run began"] * 2
    assert "Predicted beforehand, then measured" in (out / "report.html").read_text()

    # The same command again changes nothing; a measured run is not predicted unless the line says so.
    assert main("study", "run", study, "--out", out).returncode == 0
    assert len(Register(out / "predictions.jsonl").read()) == 2
    fitted = out / "fits" / "power-dense.json"
    refused = main("predict", fitted, "--study", out, "--for", largest[0])
    assert refused.returncode == 2
    assert "known already" in refused.stderr
    late = main("predict", fitted, "--study", out, "--for", largest[0], "--after", "--json")
    assert late.returncode == 0, late.stderr
    assert json.loads(late.stdout)["registered"][0]["after"] is True
    again = json.loads(main("study", "report", out, "--json").stdout)
    assert [one["when"] for one in again["predictions"]][-1] == "after the run"
    frontier = main("study", "frontier", out, "--compute", "1e12", "--json")
    assert "dense: no optimal size" in json.loads(frontier.stdout)["missing"][0]
    assert main("study", "frontier", out, "--compute", "-1").returncode == 2
    unknown = main("predict", fitted, "--study", out, "--for", "dense-d16-41steps-s0")
    assert unknown.returncode == 2
    assert "did you mean dense-d16-40steps-s0" in unknown.stderr

    # A fit says which columns it was made from; runs of a study are read there, or the prediction is refused.
    points = out / "points.csv"
    assert main("fit", points, "--law", "power", "--map", "c=d", "--out", tmp_path / "d.json").returncode == 0
    by_tokens = main("predict", tmp_path / "d.json", "--study", out, "--for", largest[0], "--after", "--json")
    assert by_tokens.returncode == 0, by_tokens.stderr
    (line,) = json.loads(by_tokens.stdout)["registered"]
    assert line["columns"] == {"c": "d"}
    assert line["variables"]["c"] == read_record(out / "runs" / largest[0]).steps[-1]["tokens"]
    theirs = tmp_path / "theirs.csv"
    theirs.write_text(points.read_text().replace(",d,", ",seen,", 1))
    assert main("fit", theirs, "--law", "power", "--map", "c=seen", "--out", tmp_path / "seen.json").returncode == 0
    foreign = main("predict", tmp_path / "seen.json", "--study", out, "--for", largest[0], "--after")
    assert foreign.returncode == 2
    assert "c was fitted to column seen, which runs of a study do not have" in foreign.stderr


def test_predict_registers_given_variables(main, tmp_path):
    table = tmp_path / "points.csv"
    rows = [f"{c:g},{30 * c**-0.08 + 0.001 * (i % 2):.6f}" for i, c in enumerate((1e11, 2e11, 4e11, 8e11, 1.6e12))]
    table.write_text("\n".join(["c,loss", *rows]))
    fitted, register = tmp_path / "fit.json", tmp_path / "register.jsonl"
    assert main("fit", table, "--law", "power", "--out", fitted).returncode == 0
    done = main("predict", fitted, "--compute", "1e13", "--register", register, "--for", "the big one")
    assert done.returncode == 0, done.stderr
    assert "the big one: loss 2.7" in done.stdout
    (entry,) = Register(register).read()
    assert entry.prediction.run == "the big one"
    assert entry.prediction.steps is None
    for arguments, word in (
        (("--compute", "1e13", "--register", register), "--for NAME"),
        (("--compute", "1e13", "--for", "x"), "--study DIR"),
        (("--n", "1e6", "--register", register, "--for", "x"), "--compute"),
        (("--study", tmp_path, "--for", "x"), "no study here"),
        (("--study", tmp_path), "--for RUN"),
        (("--study", tmp_path, "--for", "x", "--n", "1"), "--n"),
    ):
        refused = main("predict", fitted, *arguments)
        assert refused.returncode == 2
        assert word in refused.stderr
        assert "Traceback" not in refused.stderr


@pytest.mark.parametrize(
    ("hold_out", "word"),
    [
        ("d>=1e9", "nothing to predict"),
        ("d>=1", "nothing is left"),
        ("loss<3", "not known before"),
        ("tokens_per_second>3", "not known before"),
    ],
)
def test_conditions_that_name_no_runs_beforehand_are_refused(work: Path, tmp_path: Path, hold_out: str, word: str):
    path = tmp_path / "study.yaml"
    path.write_text(STUDY.format(work=work).replace("d>=800", hold_out))
    study = load_study(path)
    expansion = expand(study)
    with pytest.raises(UserError, match=word):
        predicted_runs(study, expansion, plan_study(study, expansion))


def test_a_prediction_needs_runs_held_out(work: Path, tmp_path: Path):
    path = tmp_path / "study.yaml"
    path.write_text(STUDY.format(work=work).replace('hold_out: "d>=800", ', ""))
    with pytest.raises(UserError, match="what is predicted must be held out"):
        load_study(path)
