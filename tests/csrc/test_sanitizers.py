"""The shipped kernels under AddressSanitizer and ThreadSanitizer: ragged cases, threads and blocks in a drawn order.

Cases are small: ThreadSanitizer takes a millisecond for every CUDA thread that it is to tell from the others.
"""

import pytest
import torch

from moescale.moe import reference

SEED = 4
pytestmark = pytest.mark.parametrize("sanitizer", ["address", "thread"])


@pytest.mark.parametrize(("experts", "active", "sigmoid"), [(3, 2, False), (40, 6, True)])
def test_route(emulated, sanitizer, experts, active, sigmoid):
    ops = emulated(SEED, sanitizer)
    draw = torch.Generator().manual_seed(0)
    tokens = 34  # two blocks, the second with one warp at work
    logits_TE = torch.randn(tokens, experts, generator=draw)
    mask_T = torch.rand(tokens, generator=draw) < 0.8
    weight_TK, index_TK, logsumexp_T, scored_BE, *_ = ops.route(
        logits_TE, None, logits_TE > -1, mask_T, 1, True, active, sigmoid, True, 1.0
    )
    ops.route_backward(
        weight_TK, logsumexp_T, scored_BE, logits_TE, index_TK, logsumexp_T, mask_T, True, sigmoid, True, 1.0
    )


@pytest.mark.parametrize(("multiple", "limit"), [(8, -1), (1, 20)])
def test_assign(emulated, sanitizer, multiple, limit):
    index_TK = torch.randint(-1, 21, (150, 8), generator=torch.Generator().manual_seed(0))  # two chunks
    emulated(SEED, sanitizer).assign(index_TK, 20, multiple, limit)


def test_rows(emulated, sanitizer):
    ops = emulated(SEED, sanitizer)
    draw = torch.Generator().manual_seed(0)
    index_TK = torch.randint(-1, 3, (5, 3), generator=draw)
    _, _, visit_R, row_TK = reference.assign(index_TK, 3, 2, -1)
    x_TD = torch.randn(5, 264, generator=draw).bfloat16()
    weight_TK = torch.rand(5, 3, generator=draw)
    rows_RD = ops.permute(x_TD, visit_R, row_TK)
    ops.combine(rows_RD, row_TK, weight_TK)
    ops.combine_backward(x_TD, rows_RD, visit_R, weight_TK)
    gate_up = torch.cat([rows_RD, rows_RD], dim=1)
    act_RF = ops.swiglu(gate_up, weight_TK, visit_R)
    ops.swiglu_backward(act_RF, gate_up, weight_TK, visit_R)
