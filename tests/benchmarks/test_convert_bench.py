"""``bench convert``: rows from end to end on its smallest cases; nothing is left on the disk."""

import json
from pathlib import Path

import pytest

from moescale.benchmarks.convert import CASES, DEFAULT
from moescale.benchmarks.run import run


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("to-tiny", "moescale to hf-mixtral"),
        pytest.param("from-tiny", "hf-mixtral to moescale", marks=pytest.mark.slow),
    ],
)
def test_tiny_gives_a_row_for_each_implementation(
    case: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    report = run("convert", allocators={"default": {}}, cases=[case], rounds=1, seconds=0.01)
    rows = json.loads(json.dumps(report.as_json(), allow_nan=False))["rows"]
    assert [(row["case"], row["impl"]) for row in rows] == [(case, "moescale"), (case, "floor")]
    # embedding and head without padding, two layers of attention, router and experts, five norms
    parameters = 2 * 100 * 32 + 2 * (4 * 32 * 32 + 3 * 32 + 3 * 3 * 32 * 16) + 5 * 32
    for row in rows:
        assert row["gigabytes_per_second"] * row["seconds"] > parameters * 4 / 1e9
        assert row["ratio"] > 0
    assert said in rows[0]["note"]
    assert not list(tmp_path.iterdir())


def test_the_default_model_has_a_billion_parameters() -> None:
    from moescale.models.counts import count_parameters

    for case in CASES:
        if case.name in DEFAULT:
            assert 0.98e9 < count_parameters(case.shape(), case.moe(), case.vocab).all < 1.05e9
