"""A real study of which some runs fail, each for a reason of its own: the rest is done, and every failure explained."""

import json
import resource

import pytest

from moescale.launch.failure import explain_failure
from moescale.training.status import read_status, write_status

# The embedding of the large run alone takes 4 GiB; what else the processes need is far below the limit.
LIMIT = 3 << 30
STUDY = """
run: {{extends: {work}/base.yaml}}
workers: 2
groups:
  heads:
    family: dense
    set: {{training.steps: 4}}
    grid: {{model.heads: [1, 3]}}
  memory:
    family: large
    set: {{training.steps: 3}}
    grid: {{model.vocab_multiple: [512, 67_108_864]}}
  rates:
    family: wild
    set: {{training.steps: 60, optimizer.clip: 0}}
    grid: {{optimizer.lr: [0.01, 1.0e+30]}}
"""
FAILED = {
    "dense-d16-4steps-model.heads3-s0": "impossible: model.heads (3) must divide model.width (16)",
    "large-d16-3steps-model.vocab_multiple67108864-s0": "out of memory: RuntimeError: ",
    "wild-d16-60steps-lr1e30-s0": "not finite",
}
DONE = ["dense-d16-4steps-model.heads1-s0", "large-d16-3steps-model.vocab_multiple512-s0", "wild-d16-60steps-lr0.01-s0"]


@pytest.mark.distributed
def test_failures_are_explained_and_the_rest_is_done(work, moescale, main):
    file, out = work / "failures.yaml", work / "failures"
    file.write_text(STUDY.format(work=work))
    result = moescale(
        "study", "run", file, "--out", out, "--json",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT)),
    )  # fmt: skip
    assert result.returncode == 1, result.stderr
    summary = json.loads(result.stdout)
    assert summary["done"] == len(DONE)
    reasons = {failure["run"]: failure["reason"] for failure in summary["failed"]}
    assert sorted(reasons) == sorted(FAILED)
    for name, words in FAILED.items():
        assert words in reasons[name]
        assert "\n" not in reasons[name]
        status = read_status(out / "runs" / name)
        assert status is not None
        assert (status.state, status.reason) == ("failed", reasons[name])
        assert name in (out / "points.csv").read_text()
        assert name in (out / "report.html").read_text()
    assert "lower workers, training.micro_batch or the size of the model" in reasons[list(FAILED)[1]]
    assert "warning: dense-d16-4steps-model.heads3-s0 is impossible" in result.stderr

    listed = {run["name"]: run["state"] for run in json.loads(main("study", "status", out, "--json").stdout)["runs"]}
    assert listed == {**dict.fromkeys(DONE, "done"), **dict.fromkeys(FAILED, "failed")}


def test_a_reason_of_an_earlier_attempt_is_not_given_again(tmp_path):
    write_status(tmp_path, "failed", reason="ValueError: of the first attempt")
    (tmp_path / "1.log").write_text("error: of this one\n")
    before = read_status(tmp_path)
    assert before is not None
    assert explain_failure(tmp_path, tmp_path / "1.log", before.updated - 1, 1) == "ValueError: of the first attempt"
    said = explain_failure(tmp_path, tmp_path / "1.log", before.updated + 1, 2)
    assert said.startswith("exit code 2: of this one; see ")
    after = read_status(tmp_path)
    assert after is not None
    assert (after.state, after.reason) == ("failed", said)


@pytest.mark.parametrize(
    ("written", "code", "words"),
    [
        ("MemoryError: ", 1, "out of memory: MemoryError"),
        ("ArrayMemoryError: Unable to allocate 7.45 GiB for an array", 1, "out of memory: ArrayMemoryError"),
        ("OutOfMemoryError: CUDA out of memory.\nTried to allocate", 1, "CUDA out of memory.; lower workers"),
        (None, -9, "the machine had no memory left: lower workers"),
        (None, -11, "killed by SIGSEGV; see "),
    ],
)
def test_a_lack_of_memory_is_called_that(tmp_path, written, code, words):
    if written is not None:
        write_status(tmp_path, "failed", reason=written, step=3, steps_total=9, attempt=2)
    assert words in explain_failure(tmp_path, tmp_path / "1.log", 0.0, code)
    status = read_status(tmp_path)
    assert status is not None
    assert words in str(status.reason)
    assert written is None or (status.step, status.steps_total, status.attempt) == (3, 9, 2)
