"""``bench exchange``: what is compared, and rows from end to end on the smallest case."""

import json

import pytest

from moescale.base.errors import UserError
from moescale.benchmarks.exchange import CASES, DEFAULT, ExchangeCase, implementations
from moescale.benchmarks.run import run
from moescale.parallel.exchange.shared import unavailable

ALLOCATORS = {"default": {}}
shared = pytest.mark.skipif(bool(unavailable()), reason=f"no exchange through shared memory: {unavailable()}")


def test_a_case_is_as_large_as_its_name_says() -> None:
    assert {"rows-64k", "rows-16M", "gather-16M"} <= set(DEFAULT)
    for case in CASES:
        assert case.rows * 1024 * 4 == case.bytes
        assert case.rows % 2 == 0, "half of the rows stay"
        assert case.tokens == case.rows * case.repeats
    assert ExchangeCase(1 << 20, dtype="bf16").rows == 2 * ExchangeCase(1 << 20).rows


def test_ours_comes_first_and_the_copy_last() -> None:
    found = implementations(CASES[0], ("gloo", "mpi"))
    assert {name: one.payload["kind"] for name, one in found.items()} == {
        "moescale": "shared",
        "gloo": "gloo",
        "mpi": "mpi",
        "floor": "copy",
    }


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UserError, match="--against nccl: unknown; bench exchange compares with gloo, mpi"):
        run("exchange", allocators=ALLOCATORS, against=["nccl"])
    with pytest.raises(UserError, match="--case rows-1G: unknown"):
        run("exchange", allocators=ALLOCATORS, against=["gloo"], cases=["rows-1G"])


@shared
@pytest.mark.slow
@pytest.mark.distributed
def test_the_smallest_case_gives_a_row_for_each_implementation() -> None:
    case = next(case for case in CASES if case.name == "rows-64k")
    report = run("exchange", allocators=ALLOCATORS, against=["gloo"], cases=[case.name], rounds=1, seconds=0.01)
    rows = {row["impl"]: row for row in json.loads(json.dumps(report.as_json(), allow_nan=False))["rows"]}
    assert list(rows) == ["moescale", "gloo", "floor"]
    for row in rows.values():
        assert row["gigabytes_per_second"] == pytest.approx(case.bytes / row["seconds"] / 1e9)
        assert row["tokens_per_second"] == pytest.approx(case.rows / row["seconds"])
        assert row["ratio"] == pytest.approx(row["seconds"] / row["floor_seconds"])
