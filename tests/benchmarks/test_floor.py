"""The floor's products are those that the exact FLOP count counts, however they are multiplied."""

import dataclasses

import pytest
import torch

from moescale.benchmarks import layer_cases
from moescale.benchmarks.cases import CASES, Case
from moescale.benchmarks.floor import Floor, LayerFloor, mixture_products, products

SMALL = Case(
    "small", "fp32", threads=1, width=16, layers=2, heads=2, ffn=32, vocab=64, seq=8, batch=2,
    experts=4, active=2, expert_width=8,
)  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name}-{case.dtype}")
def test_products_are_the_flops_of_a_step(case: Case) -> None:
    assert sum(product.flops for product in products(case)) == case.flops


@pytest.mark.parametrize("case", layer_cases.CASES, ids=lambda case: f"{case.name}-{case.dtype}-{case.threads}")
def test_products_are_those_of_a_mixture(case: layer_cases.LayerCase) -> None:
    found = mixture_products(case.tokens, case.width, case.experts, case.active, case.expert_width, layers=1)
    expected = case.width * (case.experts + case.active * 3 * case.expert_width)
    assert sum(product.flops for product in found) == 3 * 2 * case.tokens * expected


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("way", ["mm", "bmm", "grouped_mm"])
def test_a_step_multiplies_forward_and_backward(way: str, dtype: str) -> None:
    floor = Floor(dataclasses.asdict(dataclasses.replace(SMALL, dtype=dtype)), data={})
    operands = [one for alike in floor.operands for one in alike]
    assert sum(way in one.ways for one in operands) >= 4  # experts of two layers in and out, at least
    for one in operands:
        one.way = way if way in one.ways else one.way
    floor.step()
    bound = 1e-5 if dtype == "fp32" else 2e-2
    for one in operands:
        torch.testing.assert_close(one.y, one.x @ one.w.mT, rtol=bound, atol=bound)
        torch.testing.assert_close(one.dx, one.y @ one.w, rtol=bound, atol=bound)
        torch.testing.assert_close(one.dw, one.y.mT @ one.x, rtol=bound, atol=bound)


def test_the_warm_up_says_how_experts_are_multiplied() -> None:
    tiny = next(case for case in layer_cases.CASES if case.name == "tiny")
    floor = LayerFloor(dataclasses.asdict(tiny))
    note = floor.warm_up()
    for (one,), widths in zip(floor.operands[1:], ("32 to 32", "16 to 32"), strict=True):
        assert f"experts {widths} by {one.way} (mm " in note
