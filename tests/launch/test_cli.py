"""The command line: what it refuses and how fast, what it prints."""

import json
import time

import pytest

from moescale.launch import cli_train


def test_help_is_fast(moescale):
    """In one of a few turns, since other work on the machine only ever makes it slower."""
    assert any(_seconds(moescale, "--help") < 0.5 * _slowness() for _ in range(8))


def _seconds(moescale, *arguments: str) -> float:
    began = time.perf_counter()
    assert moescale(*arguments).returncode == 0
    return time.perf_counter() - began


def _slowness() -> float:
    """How much slower this machine is just now than one that sums a million numbers in 20 ms."""
    began = time.perf_counter()
    sum(range(1_000_000))
    return max((time.perf_counter() - began) / 0.02, 1.0)


@pytest.mark.parametrize(
    ("content", "overrides", "words"),
    [
        ("modle: {shape: d16}", [], ["modle", "did you mean model"]),
        ("", ["training.batch=many"], ["training.batch", "'many'"]),
        ("", ["training.steps"], ["training.steps", "write key=value"]),
        ("", ["model.heads=3"], ["model.heads (3)", "model.width (16)"]),
        ("", ["parallel.tensor=2"], ["parallel.tensor (2)", "number of ranks (1)"]),
        ("moe: {experts: 2, active: 4, granularity: 1}", [], ["moe.active (4)", "moe.experts (2)"]),
        (": :", [], ["not valid YAML"]),
    ],
)
def test_wrong_run_files_end_in_one_message(work, main, tmp_path, content, overrides, words):
    file = tmp_path / "run.yaml"
    file.write_text(f"extends: {work}/base.yaml\ntraining: {{steps: 2}}\n{content}\n")
    result = main("train", file, *overrides, "--out", tmp_path / "out")
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr
    assert not (tmp_path / "out").exists()


def test_wrong_input_from_outside(moescale, tmp_path):
    result = moescale("train", tmp_path / "absent.yaml")
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert "absent.yaml: cannot be read" in result.stderr
    assert result.stderr.count("\n") == 1


def test_under_a_launcher_every_rank_speaks_and_rank_0_first(main, monkeypatch, tmp_path):
    monkeypatch.setattr(cli_train, "SECONDS_FOR_RANK_0", 1)
    for name, value in {
        "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "29500",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    for rank, says, waits in (("0", "error: ", 0), ("1", "error (rank 1): ", 1)):
        monkeypatch.setenv("RANK", rank)
        began = time.monotonic()
        result = main("train", tmp_path / "absent.yaml")
        assert result.returncode == 2
        assert result.stderr.startswith(f"{says}{tmp_path}/absent.yaml: cannot be read")
        assert time.monotonic() - began >= waits


def test_dry_run_and_train_agree(work, main, moescale, tmp_path):
    file = tmp_path / "tiny.yaml"
    file.write_text(f"extends: {work}/base.yaml\ntraining: {{steps: 3}}\n")
    planned = json.loads(main("train", file, "--dry-run", "--json").stdout)
    assert not (tmp_path / "runs").exists()
    (row,) = planned["runs"]
    assert (row["steps"], row["tokens"], row["layout"]["world"]) == (3, 96, 1)
    result = moescale("train", file, "--json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout)
    assert summary["state"] == "done"
    assert summary["step"] == summary["steps_total"] == 3
    header = json.loads((tmp_path / "runs" / "tiny" / "record.jsonl").open().readline())
    assert header["config_hash"] == row["config_hash"]
    assert header["parameters"]["total"] == row["n_total"]
    again = main("train", file, "training.seed=1", "--out", tmp_path / "runs" / "tiny")
    assert again.returncode == 2
    assert "holds another run" in again.stderr


def test_study_plan(work, main, tmp_path):
    file = tmp_path / "study.yaml"
    file.write_text(
        f"run: {{extends: {work}/base.yaml}}\n"
        "groups: {a: {family: dense, grid: {training.steps: [10, 100], training.seed: [0, 1]}}}\n"
    )
    result = main("study", "plan", file, "--json", "workers=2")
    assert result.returncode == 0, result.stderr
    planned = json.loads(result.stdout)
    names = {row["name"] for row in planned["runs"]}
    assert names == {f"dense-d16-{steps}steps-s{seed}" for steps in (10, 100) for seed in (0, 1)}
    assert planned["totals"]["runs"] == 4
    assert planned["totals"]["flops"] == sum(row["flops"] for row in planned["runs"])
    assert planned["totals"]["workers"] == 2
    assert any("2 runs have fewer than 50 steps" in warning for warning in planned["warnings"])


def test_doctor(main):
    result = main("doctor", "--json")
    found = {finding["what"]: finding for finding in json.loads(result.stdout)["findings"]}
    assert result.returncode == 0
    assert {"python", "torch", "deepspeed", "megatron-core", "cuda", "apex", "compiler"} <= set(found)
    assert all(finding["advice"] for finding in found.values() if not finding["ok"])


def test_fit_and_predict(main, tmp_path):
    table = tmp_path / "points.csv"
    rows = [f"{c:g},{30 * c**-0.08:.6f}" for c in (1e11, 2e11, 4e11, 8e11, 1.6e12)]
    table.write_text("\n".join(["compute,loss", *rows]))
    options = ("--map", "c=compute", "--hold-out", "c>1e12", "--out", tmp_path / "fit.json")
    fitted = main("fit", table, "--law", "power", *options, "--json")
    assert fitted.returncode == 0, fitted.stderr
    content = json.loads(fitted.stdout)
    assert content["coefficients"]["b"]["value"] == pytest.approx(0.08, abs=1e-3)
    assert content["held_out"]["n"] == 1
    predicted = main("predict", tmp_path / "fit.json", "--compute", "1e13", "--json")
    prediction = json.loads(predicted.stdout)
    assert prediction["loss"]["value"] == pytest.approx(30 * 1e13**-0.08, rel=1e-3)
    assert "above the fitted range" in prediction["warnings"][0]
    for arguments, word in (
        (("fit", table, "--law", "pwoer"), "power"),
        (("fit", table, "--law", "power", "--map", "c"), "VARIABLE=COLUMN"),
        (("fit", table, "--law", "power", "--map", "c=compute", "--hold-out", "c=1"), "not a comparison"),
        (("predict", tmp_path / "fit.json", "--n", "1e9"), "--compute"),
        (("predict", table, "--compute", "1e9"), "fit"),
    ):
        refused = main(*arguments)
        assert refused.returncode == 2
        assert word in refused.stderr
        assert "Traceback" not in refused.stderr
