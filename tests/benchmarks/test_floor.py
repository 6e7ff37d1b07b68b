"""The floor's products are those that the exact FLOP count counts."""

import dataclasses

import pytest
import torch

from moescale.benchmarks.cases import CASES, Case
from moescale.benchmarks.floor import Floor, products


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name}-{case.dtype}")
def test_products_are_the_flops_of_a_step(case: Case) -> None:
    assert sum(product.flops for product in products(case)) == case.flops


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_step_multiplies_forward_and_backward(dtype: str) -> None:
    case = Case(
        "small", dtype, threads=1, width=16, layers=1, heads=2, ffn=32, vocab=64, seq=8, batch=2,
        experts=4, active=2, expert_width=8,
    )  # fmt: skip
    floor = Floor(dataclasses.asdict(case), data={})
    floor.step()
    bound = 1e-5 if dtype == "fp32" else 2e-2
    for operands in floor._operands:
        torch.testing.assert_close(operands.y, operands.x @ operands.w.mT, rtol=bound, atol=bound)
        torch.testing.assert_close(operands.dx, operands.y @ operands.w, rtol=bound, atol=bound)
        torch.testing.assert_close(operands.dw, operands.y.mT @ operands.x, rtol=bound, atol=bound)
