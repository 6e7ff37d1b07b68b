"""The CUDA kernels agree with the references, whatever the schedule; no GPU is needed.

References are computed in float64 from the same inputs. Every result must be the same to the last bit under every
schedule of threads and blocks: no sum may depend on who came first.
"""

import pytest
import torch

from moescale.moe import reference

SEEDS = (0, 7)


def both(emulated, operation, *arguments):
    """The operation's results, equal under every seed."""
    results = []
    for seed in SEEDS:
        copies = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
        got = getattr(emulated(seed), operation)(*copies)
        results.append((*(got if isinstance(got, tuple) else (got,)), *copies))
    for first, second in zip(*results, strict=True):
        if isinstance(first, torch.Tensor):
            assert torch.equal(first.nan_to_num(-7), second.nan_to_num(-7))
    return results[0]


def widened(*arguments):
    return [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments]


def test_route(emulated, route_case, close):
    arguments = route_case.arguments()
    wanted = reference.route(*widened(*arguments))
    for got_one, wanted_one in zip(both(emulated, "route", *arguments)[:6], wanted, strict=True):
        close(got_one, wanted_one, 2e-6)


def test_route_backward(emulated, route_case, close):
    logits_TE, _, _, mask_T, sequences, batch_first, active, *rule = arguments = route_case.arguments()
    _, index_TK, logsumexp_T, *_ = reference.route(*widened(*arguments))
    draw = torch.Generator().manual_seed(3)
    tokens, experts = logits_TE.shape
    grads = [torch.randn(shape, generator=draw) for shape in ((tokens, active), (tokens,), (sequences, experts))]
    given = (*grads, logits_TE, index_TK, logsumexp_T.float(), mask_T, batch_first, *rule)
    close(both(emulated, "route_backward", *given)[0], reference.route_backward(*widened(*given)), 5e-6)


@pytest.mark.parametrize("sigmoid", [False, True])
def test_route_takes_the_lower_of_equals_and_never_a_nan(emulated, sigmoid):
    logits_TE = torch.zeros(2, 70)
    logits_TE[0, 40:] = -1
    bias_E = torch.zeros(70)
    if sigmoid:  # under softmax one NaN makes every score NaN
        logits_TE[0, 2] = float("nan")
    logits_TE[1] = float("nan")
    allowed_TE = torch.ones(2, 70, dtype=torch.bool)
    allowed_TE[0, 4] = False
    arguments = (logits_TE, bias_E, allowed_TE, None, 1, False, 6, sigmoid, False, 1.0)
    weight_TK, index_TK, *_ = both(emulated, "route", *arguments)
    assert index_TK[0].tolist() == ([0, 1, 3, 5, 6, 7] if sigmoid else [0, 1, 2, 3, 5, 6])
    assert index_TK[1].tolist() == [-1] * 6
    assert weight_TK[1].tolist() == [0] * 6
    assert torch.equal(index_TK, reference.route(*arguments)[1])


def test_assign(emulated, visit_case):
    given = (visit_case.index_TK(), visit_case.experts, visit_case.multiple, visit_case.limit)
    for got, wanted in zip(both(emulated, "assign", *given)[:4], reference.assign(*given), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.slow
def test_assign_beyond_the_most_chunks(emulated):
    draw = torch.Generator().manual_seed(0)
    given = (torch.randint(-1, 9, (160_000, 8), generator=draw), 8, 8, -1)
    for got, wanted in zip(both(emulated, "assign", *given)[:4], reference.assign(*given), strict=True):
        assert torch.equal(got, wanted)


def dispatched(case):
    visits = case.visits
    _, _, visit_R, row_TK = reference.assign(visits.index_TK(), visits.experts, visits.multiple, visits.limit)
    return visit_R, row_TK


def test_permute(emulated, rows_case):
    given = (rows_case.randn(rows_case.visits.tokens, rows_case.width, 1), *dispatched(rows_case))
    assert torch.equal(both(emulated, "permute", *given)[0], reference.permute(*given))


@pytest.mark.parametrize("weighted", [True, False])
def test_combine(emulated, rows_case, weighted, close):
    visit_R, row_TK = dispatched(rows_case)
    rows_RD = rows_case.randn(len(visit_R), rows_case.width, 2)
    rows_RD[visit_R < 0] = float("nan")  # rows that no visit refers to are never read
    given = (rows_RD, row_TK, rows_case.weight_TK() if weighted else None)
    close(both(emulated, "combine", *given)[0], reference.combine(*widened(*given)), rows_case.tolerance())


def test_combine_backward(emulated, rows_case, close):
    visit_R, _ = dispatched(rows_case)
    grad_TD = rows_case.randn(rows_case.visits.tokens, rows_case.width, 3)
    given = (grad_TD, rows_case.randn(len(visit_R), rows_case.width, 2), visit_R, rows_case.weight_TK())
    got = both(emulated, "combine_backward", *given)[:2]
    wanted = reference.combine_backward(*widened(*given))
    close(got[0], wanted[0], rows_case.tolerance())
    close(got[1], wanted[1], 1e-5)


@pytest.mark.parametrize("weighted", [True, False])
def test_swiglu(emulated, rows_case, weighted, close):
    gate_up, weights = gate_up_and_weights(rows_case, weighted)
    got = both(emulated, "swiglu", gate_up, *weights)[0]
    close(got, reference.swiglu(*widened(gate_up, *weights)), rows_case.tolerance())


@pytest.mark.parametrize("weighted", [True, False])
def test_swiglu_backward(emulated, rows_case, weighted, close):
    gate_up, weights = gate_up_and_weights(rows_case, weighted)
    grad_RF = rows_case.randn(len(gate_up), rows_case.width, 5)
    if weighted:
        grad_RF[weights[1] < 0] = float("nan")
    grad_gate_up, grad_weight, act_RF, *_ = both(emulated, "swiglu_backward", grad_RF, gate_up, *weights)
    wanted_gate_up, wanted_weight = reference.swiglu_backward(
        *widened(grad_RF.nan_to_num(0), gate_up.nan_to_num(0), *weights)
    )
    close(grad_gate_up, wanted_gate_up, rows_case.tolerance())
    close(grad_weight, wanted_weight, 1e-5)
    assert torch.equal(act_RF, emulated().swiglu(gate_up, *weights))


def gate_up_and_weights(case, weighted):
    """Where rows are weighted, those without a visit hold NaN: they are never read."""
    visit_R, _ = dispatched(case)
    gate_up = 3 * case.randn(len(visit_R), 2 * case.width, 4)
    if not weighted:
        return gate_up, (None, None)
    gate_up[visit_R < 0] = float("nan")
    return gate_up, (case.weight_TK(), visit_R)
