"""Permute and combine against loops; any routing is legal input."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moescale.moe.dispatch import Assignment, combine, permute
from moescale.moe.experts import GroupedExperts, feed_forward


@st.composite
def routings(draw: st.DrawFn) -> tuple[Tensor, int]:
    """(index_TK, E) with distinct experts a token; from scattered over all of them to all tokens alike; slots may be
    empty."""
    experts = draw(st.integers(1, 9))
    active = draw(st.integers(1, experts))
    tokens = draw(st.integers(0, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    rows = [torch.randperm(experts, generator=generator)[:active] for _ in range(tokens)]
    if draw(st.booleans()):  # all tokens visit the same experts
        rows = rows[:1] * tokens
    index_TK = torch.stack(rows) if rows else torch.empty(0, active, dtype=torch.int64)
    if draw(st.booleans()):
        index_TK = index_TK.masked_fill(torch.rand(index_TK.shape, generator=generator) < 0.3, -1)
    return index_TK, experts


@given(routings())
def test_the_plan_orders_by_expert_then_token(case: tuple[Tensor, int]) -> None:
    index_TK, experts = case
    plan = Assignment.build(index_TK, experts)
    active = index_TK.shape[1]
    visits = sorted((int(e), t, k) for t, row in enumerate(index_TK) for k, e in enumerate(row) if e >= 0)
    assert plan.visit_R.tolist() == [t * active + k for _, t, k in visits]
    assert plan.counts_E.tolist() == [sum(e == i for e, _, _ in visits) for i in range(experts)]
    rows = {(t, k): row for row, (_, t, k) in enumerate(visits)}
    assert all(plan.row_TK[t, k] == rows.get((t, k), -1) for t in range(len(index_TK)) for k in range(active))


@settings(deadline=None)
@given(routings(), st.integers(1, 5))
def test_permute_and_combine_are_loops(case: tuple[Tensor, int], width: int) -> None:
    index_TK, experts = case
    tokens, active = index_TK.shape
    generator = torch.Generator().manual_seed(tokens)
    x_TD = torch.randn(tokens, width, dtype=torch.float64, generator=generator)
    weight_TK = torch.rand(tokens, active, dtype=torch.float64, generator=generator)
    plan = Assignment.build(index_TK, experts)
    rows_RD = permute(x_TD, plan)
    assert rows_RD.shape == (int((index_TK >= 0).sum()), width)
    done_RD = rows_RD * torch.arange(1.0, experts + 1).repeat_interleave(plan.counts_E).unsqueeze(-1)
    y_TD = combine(done_RD, weight_TK, plan)
    expected = torch.zeros_like(x_TD)
    for t in range(tokens):
        for k in (k for k in range(active) if index_TK[t, k] >= 0):
            expected[t] += weight_TK[t, k] * (index_TK[t, k] + 1) * x_TD[t]
    torch.testing.assert_close(y_TD, expected)


@settings(deadline=None, max_examples=25)
@given(routings(), st.integers(1, 4))
def test_gradients(case: tuple[Tensor, int], width: int) -> None:
    """Against finite differences, in float64."""
    index_TK, experts = case
    if not index_TK.numel():
        return
    plan = Assignment.build(index_TK, experts, multiple=2)
    generator = torch.Generator().manual_seed(width)
    x_TD = torch.randn(len(index_TK), width, dtype=torch.float64, generator=generator).requires_grad_()
    rows_RD = torch.randn(len(plan.visit_R), width, dtype=torch.float64, generator=generator).requires_grad_()
    weight_TK = torch.rand(index_TK.shape, dtype=torch.float64, generator=generator).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: permute(x, plan), x_TD)
    assert torch.autograd.gradcheck(lambda r, w: combine(r, w, plan), (rows_RD, weight_TK))
    assert torch.autograd.gradcheck(lambda r: combine(r, None, plan), rows_RD)


def test_combine_keeps_the_rows_dtype_and_float32_weights() -> None:
    plan = Assignment.build(torch.tensor([[1, 0], [0, 2]]), 3)
    rows = torch.randn(4, 8).bfloat16().requires_grad_()
    weights = torch.rand(2, 2, requires_grad=True)
    y = combine(rows, weights, plan)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert rows.grad is not None
    assert rows.grad.dtype == torch.bfloat16
    assert weights.grad is not None
    assert weights.grad.dtype == torch.float32


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=6))
def test_experts_take_any_counts(counts: list[int]) -> None:
    """Also none at all for some experts, or for all of them; experts without rows get zero gradients."""
    generator = torch.Generator().manual_seed(sum(counts))
    experts = GroupedExperts(len(counts), 16, 8)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    rows = torch.randn(sum(counts), 16, generator=generator).requires_grad_()
    index_R1 = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).unsqueeze(-1)
    weight_R1 = torch.rand(index_R1.shape, generator=generator).requires_grad_()
    plan = Assignment.build(index_R1, len(counts))
    torch.testing.assert_close(experts(rows, plan), experts(rows, plan, torch.ones_like(weight_R1)))
    found = experts(rows, plan, weight_R1)
    parts = []
    for expert, part in enumerate(rows.split(counts)):
        gate, up = (part @ experts.w_in[expert].T).chunk(2, dim=-1)
        parts.append((torch.nn.functional.silu(gate) * up) @ experts.w_out[expert].T)
    expected = torch.cat(parts) * weight_R1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    wanted = [rows, *experts.parameters(), weight_R1]
    mine = torch.autograd.grad(found.square().sum(), wanted)
    other = torch.autograd.grad(expected.square().sum(), wanted)
    for a, b in zip(mine, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    for expert, count in enumerate(counts):
        if count == 0:
            assert mine[1][expert].abs().max() == 0


def test_one_network_is_an_expert_that_sees_every_token() -> None:
    generator = torch.Generator().manual_seed(0)
    x, w_in, w_out = (
        torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()
        for shape in [(2, 3, 8), (12, 8), (8, 6)]
    )
    gate, up = (x @ w_in.T).chunk(2, dim=-1)
    torch.testing.assert_close(feed_forward(x, w_in, w_out), (torch.nn.functional.silu(gate) * up) @ w_out.T)
    assert torch.autograd.gradcheck(feed_forward, (x, w_in, w_out))
