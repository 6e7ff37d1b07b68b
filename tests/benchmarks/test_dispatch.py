"""``bench dispatch``: rows from end to end on its smallest case, and what is counted as moved."""

import json
from dataclasses import asdict

import pytest
import torch

from moescale.base.errors import UserError
from moescale.benchmarks.dispatch import CASES, OperationCase
from moescale.benchmarks.operations import Copy, Operation, bytes_moved, operands
from moescale.benchmarks.run import run
from moescale.moe import ops

ALLOCATORS = {"default": {}}
TINY = [case for case in CASES if case.layer.name == "tiny"]
native = pytest.mark.skipif(
    ops.implementation("route", "CPU") == "reference", reason=f"native operations are not in use: {ops.unavailable}"
)


@native
def test_tiny_gives_a_row_for_each_implementation() -> None:
    report = run("dispatch", allocators=ALLOCATORS, cases=["combine-tiny"], rounds=1, seconds=0.01)
    rows = {row["impl"]: row for row in json.loads(json.dumps(report.as_json(), allow_nan=False))["rows"]}
    assert list(rows) == ["moescale", "reference", "floor"]
    moved = bytes_moved("combine", operands("combine", TINY[0].layer))
    for row in rows.values():
        assert (row["case"], row["dtype"], row["threads"]) == ("combine-tiny", "fp32", 1)
        assert row["ratio"] > 0
        assert row["to_ours"] > 0
        assert row["gigabytes_per_second"] == pytest.approx(moved / row["seconds"] / 1e9)
    assert report.table().row_count == 3


def test_every_operation_is_measured() -> None:
    assert {case.operation for case in TINY} == set(ops.OPERATIONS)
    assert {case.layer.name for case in CASES} == {"tiny", "e64", "e256", "olmoe"}


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
def test_operations_run_on_their_operands(case: OperationCase) -> None:
    reference = Operation(asdict(case.layer), case.operation, "reference")
    assert reference.warm_up() == "reference"
    if ops.implementation(case.operation, "CPU") == "native":
        assert Operation(asdict(case.layer), case.operation, "native").warm_up() == "native"
    copy = Copy(asdict(case.layer), case.operation)
    copy.warm_up()
    assert torch.equal(copy.source, copy.target)
    assert copy.source.nbytes == reference.bytes_moved // 2


def test_bytes_moved_are_operands_and_results() -> None:
    """128 tokens of width 32 in float32, two visits each, to rows without padding."""
    layer = TINY[0].layer
    x, rows, visits = 128 * 32 * 4, 256 * 32 * 4, 256 * 8
    assert bytes_moved("permute", operands("permute", layer)) == x + rows + 2 * visits  # both ways round
    assert bytes_moved("combine", operands("combine", layer)) == rows + visits + 256 * 4 + x
    gate_up, act, weight = 256 * 32 * 4, 256 * 16 * 4, 256 * 4
    moved = gate_up + act + weight + visits  # read
    assert bytes_moved("swiglu_backward", operands("swiglu_backward", layer)) == moved + gate_up + act + weight


@native
def test_without_native_operations_there_is_nothing_to_measure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from moescale.compat.native import load_native

    monkeypatch.setenv("MOESCALE_OPS", "reference")
    load_native.cache_clear()
    try:
        with pytest.raises(UserError, match="MOESCALE_OPS=reference"):
            run("dispatch", allocators=ALLOCATORS, cases=["combine-tiny"])
    finally:
        monkeypatch.undo()
        load_native.cache_clear()


@pytest.mark.parametrize(
    ("keywords", "named"),
    [({"cases": ["sort-e64"]}, "--case sort-e64.*combine-e64"), ({"against": ["plain"]}, "--against plain.*reference")],
)
def test_unknown_names_are_the_users_errors(keywords: dict[str, list[str]], named: str) -> None:
    with pytest.raises(UserError, match=named):
        run("dispatch", allocators=ALLOCATORS, **keywords)
