"""``bench step`` from end to end on its smallest case, and what the user can get wrong."""

import json
import math

import pytest

from moescale.base.errors import UserError
from moescale.benchmarks.child import Child
from moescale.benchmarks.run import run
from moescale.compat.native import instruction_set
from moescale.data import DataConfig

ALLOCATORS = {"default": {}}


def test_tiny_gives_a_row_for_each_implementation(own_sources: DataConfig) -> None:
    said: list[str] = []
    report = run(
        "step",
        allocators=ALLOCATORS,
        against=["plain"],
        cases=["tiny"],
        data=own_sources,
        rounds=2,
        seconds=0.05,
        say=said.append,
    )
    document = json.loads(json.dumps(report.as_json(), allow_nan=False))
    rows = {row["impl"]: row for row in document["rows"]}
    assert set(rows) == {"moescale", "plain", "floor"}
    assert document["machine"]["cores"] >= 1
    for row in rows.values():
        assert (row["case"], row["dtype"], row["threads"], row["allocator"]) == ("tiny", "fp32", 1, "default")
        assert row["seconds"] > 0
        assert row["peak_bytes"] >= 0
        assert row["gigabytes_per_second"] is None
        assert row["floor_seconds"] == rows["floor"]["seconds"]
        assert row["to_ours"] == 1 or row["impl"] != "moescale"
        assert row["ratio"] == 1 or row["impl"] != "floor"
        assert math.isclose(row["tokens_per_second"], 512 / row["seconds"])
    assert rows["moescale"]["ratio"] > 1
    assert report.table().row_count == 3
    assert said == ["tiny fp32, 1 threads, default allocator"]


def test_the_reference_peer_is_our_step_without_the_library(own_sources: DataConfig) -> None:
    report = run(
        "step",
        allocators=ALLOCATORS,
        against=["reference", "plain"],
        cases=["quickstart"],
        data=own_sources,
        rounds=1,
        seconds=0.05,
    )
    notes = {row.impl: row.note for row in report.rows}
    assert set(notes) == {"moescale", "reference", "floor"}  # the plain transformer is dense only
    assert notes["reference"].endswith("operations: reference")
    assert notes["moescale"].endswith(f"operations: {instruction_set() or 'reference'}")


@pytest.mark.parametrize(
    ("name", "keywords", "named"),
    [
        ("stop", {}, "bench stop"),
        ("step", {"cases": ["huge"]}, "--case huge"),
        ("step", {"cases": ["e64"]}, "--case e64.*moe64"),
        ("step", {"against": ["plan"]}, "--against plan"),
    ],
)
def test_unknown_names_are_the_users_errors(name: str, keywords: dict[str, list[str]], named: str) -> None:
    with pytest.raises(UserError, match=named):
        run(name, allocators=ALLOCATORS, **keywords)


def test_a_process_that_fails_says_why() -> None:
    payload = {"case": {"name": "no such thing"}, "data": {}}
    with (
        pytest.raises(RuntimeError, match=r"(?s)floor.*code 1.*missing"),
        Child(".floor:Floor", payload, 1, {}) as child,
    ):
        child.wait_until_built()
