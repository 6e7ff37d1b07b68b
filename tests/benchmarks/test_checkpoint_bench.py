"""``bench checkpoint``: rows from end to end on its smallest cases; nothing is left on the disk."""

import json
from pathlib import Path

import pytest

from moescale.base.errors import UserError
from moescale.benchmarks.checkpoint import CASES, DEFAULT
from moescale.benchmarks.run import run

TINY = [case.name for case in CASES if case.model == "tiny"]


@pytest.mark.parametrize("case", [pytest.param(n, marks=() if n == "load-tiny" else pytest.mark.slow) for n in TINY])
def test_tiny_gives_a_row_for_each_implementation(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    report = run("checkpoint", allocators={"default": {}}, cases=[case], rounds=1, seconds=0.01)
    rows = json.loads(json.dumps(report.as_json(), allow_nan=False))["rows"]
    assert [(row["case"], row["impl"]) for row in rows] == [(case, "moescale"), (case, "floor")]
    # embedding, two layers of attention, gate, up and down, five norms; masters and two moments
    parameters = 128 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 64) + 5 * 32
    for row in rows:
        assert row["gigabytes_per_second"] == pytest.approx(parameters * 3 * 4 / row["seconds"] / 1e9)
        assert row["ratio"] > 0
    assert not list(tmp_path.iterdir())


def test_every_default_case_is_known() -> None:
    assert set(DEFAULT) == {f"{what}-{model}" for what in ("save", "load", "stall") for model in ("dense", "moe64")}
    with pytest.raises(UserError, match="--against nobody"):
        run("checkpoint", allocators={"default": {}}, against=["nobody"])
