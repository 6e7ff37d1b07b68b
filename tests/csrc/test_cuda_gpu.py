"""The CUDA operations on a GPU against the references; the same cases as on the emulator.

References are computed in float64 on the CPU from the same inputs.
"""

import pytest
import torch

from moescale.moe import ops, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(ops.implementation("route", "CUDA") != "native", reason="csrc/ was built without CUDA"),
]


def on_gpu(*arguments):
    return [a.cuda() if isinstance(a, torch.Tensor) else a for a in arguments]


def widened(*arguments):
    return [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments]


def both(operation, *arguments):
    """The operation's results on the CPU, the same to the last bit in a second call on another stream."""
    results = []
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        given = on_gpu(*arguments)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            got = getattr(ops, operation)(*given)
        torch.cuda.synchronize()
        got = (*(got if isinstance(got, tuple) else (got,)), *(a for a in given if isinstance(a, torch.Tensor)))
        results.append([one.cpu() for one in got])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first.nan_to_num(-7), second.nan_to_num(-7))
    return results[0]


def dispatched(case):
    visits = case.visits
    _, _, visit_R, row_TK = reference.assign(visits.index_TK(), visits.experts, visits.multiple, visits.limit)
    return visit_R, row_TK


def test_route(route_case, close):
    arguments = route_case.arguments()
    wanted = reference.route(*widened(*arguments))
    for got_one, wanted_one in zip(both("route", *arguments)[:6], wanted, strict=True):
        close(got_one, wanted_one, 2e-6)


def test_route_backward(route_case, close):
    logits_TE, _, _, mask_T, sequences, batch_first, active, *rule = arguments = route_case.arguments()
    _, index_TK, logsumexp_T, *_ = reference.route(*widened(*arguments))
    draw = torch.Generator().manual_seed(3)
    tokens, experts = logits_TE.shape
    grads = [torch.randn(shape, generator=draw) for shape in ((tokens, active), (tokens,), (sequences, experts))]
    given = (*grads, logits_TE, index_TK, logsumexp_T.float(), mask_T, batch_first, *rule)
    close(both("route_backward", *given)[0], reference.route_backward(*widened(*given)), 5e-6)


def test_assign(visit_case):
    given = (visit_case.index_TK(), visit_case.experts, visit_case.multiple, visit_case.limit)
    for got, wanted in zip(both("assign", *given)[:4], reference.assign(*given), strict=True):
        assert torch.equal(got, wanted)


def test_assign_reads_nothing_back():
    """A call that waited for the device could not be captured into a graph."""
    index_TK = torch.randint(0, 8, (512, 2), device="cuda")
    ops.assign(index_TK, 8, 8, -1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.assign(index_TK, 8, 8, -1)
    index_TK.copy_(torch.randint(0, 8, (512, 2)))
    graph.replay()
    for got, wanted in zip(captured, reference.assign(index_TK.cpu(), 8, 8, -1), strict=True):
        assert torch.equal(got.cpu(), wanted)


def test_permute(rows_case):
    given = (rows_case.randn(rows_case.visits.tokens, rows_case.width, 1), *dispatched(rows_case))
    assert torch.equal(both("permute", *given)[0], reference.permute(*given))


@pytest.mark.parametrize("weighted", [True, False])
def test_combine(rows_case, weighted, close):
    visit_R, row_TK = dispatched(rows_case)
    rows_RD = rows_case.randn(len(visit_R), rows_case.width, 2)
    rows_RD[visit_R < 0] = float("nan")
    given = (rows_RD, row_TK, rows_case.weight_TK() if weighted else None)
    close(both("combine", *given)[0], reference.combine(*widened(*given)), rows_case.tolerance())


def test_combine_backward(rows_case, close):
    visit_R, _ = dispatched(rows_case)
    grad_TD = rows_case.randn(rows_case.visits.tokens, rows_case.width, 3)
    given = (grad_TD, rows_case.randn(len(visit_R), rows_case.width, 2), visit_R, rows_case.weight_TK())
    got = both("combine_backward", *given)[:2]
    wanted = reference.combine_backward(*widened(*given))
    close(got[0], wanted[0], rows_case.tolerance())
    close(got[1], wanted[1], 1e-5)


@pytest.mark.parametrize("weighted", [True, False])
def test_swiglu_and_its_backward(rows_case, weighted, close):
    visit_R, _ = dispatched(rows_case)
    gate_up = 3 * rows_case.randn(len(visit_R), 2 * rows_case.width, 4)
    grad_RF = rows_case.randn(len(visit_R), rows_case.width, 5)
    weights = (rows_case.weight_TK(), visit_R) if weighted else (None, None)
    if weighted:
        gate_up[visit_R < 0] = float("nan")
        grad_RF[visit_R < 0] = float("nan")
    act_RF = both("swiglu", gate_up, *weights)[0]
    close(act_RF, reference.swiglu(*widened(gate_up, *weights)), rows_case.tolerance())
    grad_gate_up, grad_weight, overwritten, *_ = both("swiglu_backward", grad_RF, gate_up, *weights)
    wanted_gate_up, wanted_weight = reference.swiglu_backward(
        *widened(grad_RF.nan_to_num(0), gate_up.nan_to_num(0), *weights)
    )
    close(grad_gate_up, wanted_gate_up, rows_case.tolerance())
    close(grad_weight, wanted_weight, 1e-5)
    assert torch.equal(overwritten, act_RF)


def test_what_the_kernels_cannot_take_is_refused():
    x_TD = torch.zeros(4, 12, device="cuda")
    visit_R = torch.zeros(4, dtype=torch.int64, device="cuda")
    with pytest.raises(RuntimeError, match="the width must be a multiple of 8"):
        ops.permute(x_TD, visit_R, visit_R.view(4, 1))
    with pytest.raises(RuntimeError, match="must start at a multiple of 16 bytes"):
        ops.permute(torch.zeros(33, device="cuda")[1:].view(4, 8), visit_R, visit_R.view(4, 1))
    with pytest.raises(RuntimeError, match="it may be float32, float16 or bfloat16"):
        ops.combine(torch.zeros(4, 8, device="cuda", dtype=torch.float64), visit_R.view(4, 1), None)
    with pytest.raises(RuntimeError, match=r"experts \(2000\) must be between 1 and 1024"):
        ops.assign(visit_R.view(4, 1), 2000, 1, -1)
    with pytest.raises(RuntimeError, match="give both, or neither"):
        ops.swiglu(torch.zeros(4, 16, device="cuda"), None, visit_R)
