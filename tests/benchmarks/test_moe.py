"""``bench moe``: rows from end to end on its smallest case, and that all implementations compute the same there."""

import json
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

from moescale.base.errors import UserError
from moescale.benchmarks.layer_cases import CASES, LayerCase
from moescale.benchmarks.layer_peers import deepspeed_layer, megatron_layer, olmoe_layer
from moescale.benchmarks.layers import LayerStep, our_layer, ours
from moescale.benchmarks.moe import implementations
from moescale.benchmarks.run import run

TINY = next(case for case in CASES if case.name == "tiny")
ALLOCATORS = {"default": {}}


def test_tiny_gives_a_row_for_each_implementation() -> None:
    report = run("moe", allocators=ALLOCATORS, cases=["tiny"], rounds=1, seconds=0.01)
    rows = {row["impl"]: row for row in json.loads(json.dumps(report.as_json(), allow_nan=False))["rows"]}
    assert list(rows) == ["moescale", "megatron", "deepspeed", "transformers", "floor"]
    for row in rows.values():
        assert (row["case"], row["dtype"], row["threads"], row["allocator"]) == ("tiny", "fp32", 1, "default")
        assert row["seconds"] > 0
        assert row["ratio"] > 0
        assert row["to_ours"] > 0
        assert row["tokens_per_second"] == pytest.approx(TINY.tokens / row["seconds"])
        assert row["gigabytes_per_second"] is None
    weights = 4 * sum(parameter.numel() for parameter in our_layer(32, TINY.moe(), "fp32").module.parameters())
    for impl in ("moescale", "megatron", "deepspeed", "transformers"):
        assert rows[impl]["peak_bytes"] > weights, "gradients alone take as much"
    assert report.table().row_count == 5


@pytest.mark.parametrize(("dtype", "bound"), [("fp32", 1e-5), ("bf16", 3e-2)])
def test_all_compute_the_same(dtype: str, bound: float, one_rank: object) -> None:
    """The load-balance loss of the micro-batch is in ours, Megatron's and DeepSpeed's, the z-loss in the first two;
    both reach input gradients alone, so that outputs are what all four share."""
    case = replace(TINY, dtype=dtype)
    expected: LayerStep = ours(asdict(case), "natural")
    hidden = expected.layer.step(expected.x, expected.grad)
    for build in (megatron_layer, deepspeed_layer, olmoe_layer):
        layer = build(case.width, case.moe(), case.dtype)
        layer.load(expected.layer)
        found = layer.step(expected.x.detach().requires_grad_(), expected.grad)
        worst = (found - hidden).abs().flatten(0, 1).amax(dim=1) / hidden.abs().max()
        # In bf16 the peers round their scores before they select, so some tokens go elsewhere.
        assert worst.float().quantile(0.9) < bound, layer.note
        assert dtype == "bf16" or worst.max() < bound, layer.note


@pytest.mark.parametrize("routing", ["natural", "uniform", "skew"])
def test_loads_are_those_asked_for(routing: str) -> None:
    case = replace(TINY, compare="routing", seq=256)
    stepper = ours(asdict(case), routing)
    layer: Any = stepper.layer.module
    layer(stepper.x)
    visits_E = layer.take_statistics()[: case.experts]
    assert visits_E.sum() == case.tokens * case.active
    if routing == "uniform":
        assert visits_E.max() < 1.2 * visits_E.mean()
    if routing == "skew":
        assert visits_E[0] > 1.5 * visits_E[-1]
    stepper.warm_up()
    assert stepper.x.grad is not None
    assert torch.isfinite(stepper.x.grad).all()


def test_routing_is_compared_among_ours_alone() -> None:
    case = next(case for case in CASES if case.name == "e64-routing")
    assert list(implementations(case, ("megatron",))) == ["moescale", "moescale, uniform", "moescale, skew", "floor"]


def test_default_cases_run_on_one_thread_and_on_two() -> None:
    def named(name: str) -> list[LayerCase]:
        return [case for case in CASES if case.name == name]

    for name in ("e8", "e64", "e256", "e64-routing"):
        assert [(case.dtype, case.threads) for case in named(name)] == [
            ("fp32", 1), ("fp32", 2), ("bf16", 1), ("bf16", 2),
        ]  # fmt: skip


@pytest.mark.parametrize(
    ("keywords", "named"),
    [({"cases": ["e9"]}, "--case e9.*e64-routing"), ({"against": ["plain"]}, "--against plain.*deepspeed")],
)
def test_unknown_names_are_the_users_errors(keywords: dict[str, list[str]], named: str) -> None:
    with pytest.raises(UserError, match=named):
        run("moe", allocators=ALLOCATORS, **keywords)
