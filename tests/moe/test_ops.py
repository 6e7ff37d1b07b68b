"""Native operations against their references, and both against torch's own checks of what an operation promises."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moescale.moe import ops, reference

native = pytest.mark.skipif(
    ops.implementation("route", "CPU") == "reference", reason=f"native operations are not in use: {ops.unavailable}"
)
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float64: 1e-12}
ROWS = [torch.float32, torch.bfloat16, torch.float64]
SCORES = [torch.float32, torch.float64]


def random(*shape, seed, dtype=torch.float32, scale=1.0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale).to(dtype)


def assert_close(got, wanted, what=""):
    """Equal up to rounding, relative to the largest element."""
    assert got.dtype == wanted.dtype, what
    assert got.shape == wanted.shape, what
    if not got.is_floating_point():
        assert torch.equal(got, wanted), what
        return
    largest = wanted.abs().max().item() if wanted.numel() else 0.0
    torch.testing.assert_close(got, wanted, rtol=0, atol=TOLERANCE[got.dtype] * max(largest, 1e-30), msg=what)


def index_of(tokens, active, experts, seed, *, dropped=0.2, one_expert=False):
    """Visits as a router may leave them: different experts for each token, some slots empty, or all to one expert."""
    generator = torch.Generator().manual_seed(seed)
    index_TK = torch.rand(tokens, experts, generator=generator).argsort(dim=-1)[:, :active]
    if one_expert:
        index_TK = torch.full((tokens, active), experts - 1)
    return index_TK.masked_fill(torch.rand(tokens, active, generator=generator) < dropped, -1)


@st.composite
def dispatches(draw):
    tokens, experts = draw(st.integers(0, 40)), draw(st.integers(1, 12))
    active, multiple = draw(st.integers(1, experts)), draw(st.sampled_from([1, 1, 8]))
    limit = draw(st.sampled_from([-1, -1, 0, multiple, 3 * multiple]))
    index_TK = index_of(tokens, active, experts, draw(st.integers(0, 99)), one_expert=draw(st.booleans()))
    return index_TK, experts, multiple, limit


@native
@given(dispatches())
@settings(max_examples=150, deadline=None)
def test_assign_equals_its_reference(case):
    for got, wanted in zip(ops.assign(*case), reference.assign(*case), strict=True):
        assert got.dtype == wanted.dtype
        assert torch.equal(got, wanted)


@given(dispatches())
@settings(max_examples=100, deadline=None)
def test_rows_and_visits_name_each_other(case):
    index_TK, experts, multiple, limit = case
    counts_E, ends_E, visit_R, row_TK = ops.assign(*case)
    served = row_TK.flatten() >= 0
    assert torch.equal(visit_R[row_TK.flatten()[served]], served.nonzero().squeeze(-1))
    assert int((visit_R >= 0).sum()) == int(served.sum())
    row_expert = torch.arange(experts).repeat_interleave(counts_E)
    assert torch.equal(row_expert[row_TK.flatten()[served]], index_TK.flatten()[served])
    assert torch.equal(counts_E.cumsum(0).to(torch.int32), ends_E)
    assert (counts_E % multiple == 0).all()
    wanted_E = torch.bincount(index_TK[index_TK >= 0], minlength=experts)
    assert int(served.sum()) == int((wanted_E if limit < 0 else wanted_E.clamp(max=limit)).sum())


@pytest.mark.parametrize("expert", [-7, 3, 1 << 40])
def test_an_expert_that_does_not_exist_is_not_visited(expert):
    counts_E, _, _, row_TK = ops.assign(torch.tensor([[0, expert], [2, 1]]), 3, 1, -1)
    assert counts_E.tolist() == [1, 1, 1]
    assert row_TK.tolist() == [[0, -1], [2, 1]]


@st.composite
def routings(draw):
    sequences, length, experts = draw(st.integers(1, 4)), draw(st.integers(0, 9)), draw(st.integers(1, 70))
    tokens, seed = sequences * length, draw(st.integers(0, 99))
    generator = torch.Generator().manual_seed(seed)
    dtype = draw(st.sampled_from(SCORES))
    logits_TE = random(tokens, experts, seed=seed, dtype=dtype, scale=draw(st.sampled_from([0.0, 1.0, 8.0])))
    bias_E = random(experts, seed=seed + 1, dtype=dtype) if draw(st.booleans()) else None
    allowed_TE = torch.rand(tokens, experts, generator=generator) < 0.5 if draw(st.booleans()) else None
    mask_T = torch.rand(tokens, generator=generator) < 0.7 if draw(st.booleans()) else None
    kind = (draw(st.booleans()), draw(st.booleans()), draw(st.sampled_from([1.0, 2.5])))
    return logits_TE, bias_E, allowed_TE, mask_T, sequences, draw(st.booleans()), draw(st.integers(1, experts)), *kind


@native
@given(routings())
@settings(max_examples=150, deadline=None)
def test_route_and_its_gradient_equal_their_references(case):
    found, wanted = ops.route(*case), reference.route(*case)
    # Equal scores may be told apart by the last bit of an exponential: compare where both chose the same experts.
    same_T = (found[1] == wanted[1]).all(dim=-1)
    assert same_T.double().mean() > 0.8 or same_T.numel() < 8
    names = ("weight", "index", "logsumexp", "scored", "visits", "entropy")
    for name, got, right in zip(names, found, wanted, strict=True):
        if name in ("weight", "index"):
            torch.testing.assert_close(got[same_T], right[same_T], rtol=1e-4, atol=1e-5)
        elif name != "visits" or same_T.all():
            torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-5)
    logits_TE, _, _, mask_T, sequences, batch_first, _, *kind = case
    gradients = [
        random(*shape, seed=number, dtype=logits_TE.dtype)
        for number, shape in enumerate([wanted[0].shape, wanted[2].shape, (sequences, logits_TE.shape[1])])
    ]
    arguments = (*gradients, logits_TE, wanted[1], wanted[2], mask_T, batch_first, *kind)
    got, right = ops.route_backward(*arguments), reference.route_backward(*arguments)
    torch.testing.assert_close(got, right, rtol=2e-4, atol=2e-5)


def test_ties_and_nans_are_settled():
    logits_TE = torch.tensor([[1.0, 1.0, 0.0], [0.0, torch.nan, 1.0]])
    index_TK = ops.route(logits_TE, None, None, None, 1, True, 2, True, False, 1.0)[1]
    assert index_TK.tolist() == [[0, 1], [2, 0]]
    assert reference.route(logits_TE, None, None, None, 1, True, 2, True, False, 1.0)[1].tolist() == [[0, 1], [2, 0]]


@native
@pytest.mark.parametrize("dtype", ROWS)
@pytest.mark.parametrize(
    ("tokens", "active", "experts", "width"),
    [(0, 1, 2, 8), (5, 1, 1, 8), (33, 3, 5, 40), (64, 2, 4, 200), (2100, 3, 5, 512)],  # the last past the caches
)
def test_rows_there_and_back_equal_their_references(dtype, tokens, active, experts, width):
    wide = torch.promote_types(dtype, torch.float32)
    index_TK = index_of(tokens, active, experts, seed=tokens)
    _, ends_E, visit_R, row_TK = reference.assign(index_TK, experts, 8, -1)
    visit_R = visit_R[: int(ends_E[-1])]
    x_TD, grad_TD = random(tokens, width, seed=1, dtype=dtype), random(tokens, width, seed=2, dtype=dtype)
    rows_RD = random(len(visit_R), width, seed=3, dtype=dtype)
    weight_TK = random(tokens, active, seed=4, dtype=wide)
    assert torch.equal(ops.permute(x_TD, visit_R, row_TK), reference.permute(x_TD, visit_R, row_TK))
    for weight in (None, weight_TK):
        assert_close(ops.combine(rows_RD, row_TK, weight), reference.combine(rows_RD, row_TK, weight))
    for name in ("combine_backward",):
        arguments = (grad_TD, rows_RD, visit_R, weight_TK)
        for got, wanted in zip(getattr(ops, name)(*arguments), getattr(reference, name)(*arguments), strict=True):
            assert_close(got, wanted, name)


@native
@pytest.mark.parametrize("dtype", ROWS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("width", [8, 32, 72])
def test_swiglu_and_its_gradient_equal_their_references(dtype, weighted, width):
    wide = torch.promote_types(dtype, torch.float32)
    index_TK = index_of(21, 2, 3, seed=width)
    visit_R = reference.assign(index_TK, 3, 1, -1)[2]
    gate_up = random(len(visit_R), 2 * width, seed=1, dtype=dtype, scale=3)
    gate_up[0, :4] = torch.tensor([0.0, -200.0, 200.0, -0.0], dtype=dtype)
    grad_act = random(len(visit_R), width, seed=2, dtype=dtype)
    weight_TK = random(21, 2, seed=3, dtype=wide) if weighted else None
    extra = (weight_TK, visit_R if weighted else None)
    assert_close(ops.swiglu(gate_up, *extra), reference.swiglu(gate_up, *extra))
    overwritten, also = grad_act.clone(), grad_act.clone()
    found = ops.swiglu_backward(overwritten, gate_up, *extra)
    for got, wanted in zip(found, reference.swiglu_backward(also, gate_up, *extra), strict=True):
        assert_close(got, wanted)
    assert_close(overwritten, also)


def examples():
    """Arguments for each operation, all of them legal."""
    index_TK = index_of(12, 2, 4, seed=0)
    _, _, visit_R, row_TK = reference.assign(index_TK, 4, 1, -1)
    x_TD, rows_RD, weight_TK = random(12, 16, seed=1), random(24, 16, seed=2), random(12, 2, seed=3)
    logits_TE, gate_up = random(12, 4, seed=4), random(24, 16, seed=5)
    routed = reference.route(logits_TE, None, None, None, 3, False, 2, True, True, 1.0)
    return {
        "route": (logits_TE, None, None, torch.arange(12) > 2, 3, False, 2, False, True, 1.0),
        "route_backward": (
            weight_TK, logits_TE[:, 0].clone(), random(3, 4, seed=6), logits_TE, routed[1], routed[2], None,
            False, True, True, 1.0,
        ),
        "assign": (index_TK, 4, 8, -1),
        "permute": (x_TD, visit_R, row_TK),
        "combine": (rows_RD, row_TK, weight_TK),
        "combine_backward": (x_TD, rows_RD, visit_R, weight_TK),
        "swiglu": (gate_up, weight_TK, visit_R),
        "swiglu_backward": (random(24, 8, seed=7), gate_up, weight_TK, visit_R),
    }  # fmt: skip


def test_every_operation_has_an_example():
    assert set(examples()) == set(ops.OPERATIONS)


@pytest.mark.parametrize("name", ops.OPERATIONS)
def test_an_operation_keeps_what_its_schema_and_its_fake_say(name):
    torch.library.opcheck(getattr(ops, name), examples()[name])


@native
@pytest.mark.parametrize("name", ops.OPERATIONS)
def test_a_result_depends_on_no_number_of_threads_and_no_chance(name):
    def once(threads):
        torch.set_num_threads(threads)
        arguments = [value.repeat(1, 1) if isinstance(value, torch.Tensor) and value.dim() == 2 else value
                     for value in big[name]]  # fmt: skip
        results = getattr(ops, name)(*arguments)
        return [*(results if isinstance(results, tuple) else (results,)), *[a for a in arguments if hasattr(a, "dim")]]

    tokens, width = 1024, 64
    index_TK = index_of(tokens, 4, 16, seed=0)
    visit_R, row_TK = reference.assign(index_TK, 16, 1, -1)[2:]
    x_TD, weight_TK = random(tokens, width, seed=1), random(tokens, 4, seed=2)
    rows_RD, logits_TE = random(len(visit_R), width, seed=3), random(tokens, 16, seed=4)
    routed = reference.route(logits_TE, None, None, None, 8, False, 4, False, True, 1.0)
    big = {
        "route": (logits_TE, None, None, None, 8, False, 4, False, True, 1.0),
        "route_backward": (weight_TK, x_TD[:, 0].clone(), random(8, 16, seed=5), logits_TE, routed[1], routed[2], None,
                           False, False, True, 1.0),
        "assign": (index_TK, 16, 8, -1),
        "permute": (x_TD, visit_R, row_TK),
        "combine": (rows_RD, row_TK, weight_TK),
        "combine_backward": (x_TD, rows_RD, visit_R, weight_TK),
        "swiglu": (rows_RD, weight_TK, visit_R),
        "swiglu_backward": (random(len(visit_R), width // 2, seed=6), rows_RD, weight_TK, visit_R),
    }  # fmt: skip
    before = torch.get_num_threads()
    try:
        for first, second in zip(once(1), once(2), strict=True):
            assert torch.equal(first, second)
    finally:
        torch.set_num_threads(before)
