"""The operations that csrc/ implements, as ``torch.ops.moescale.*``: their schemas and what stands in for them.

Every operation is defined here with its readable reference (moe/reference.py). Where csrc/ was built, its kernels
for CPU and CUDA take precedence over the references; `implementation` says which is in use. The differentiable
functions over them are in routing.py, dispatch.py and experts.py.

``-1`` means "nothing here" in every index; an expert outside ``[0, E)`` counts as -1, so that any router output is
legal. Sums are taken in float32 (float64 for float64 inputs), in an order that does not depend on threads.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch

from ..compat.native import load_native
from . import reference

_LIBRARY = torch.library.Library("moescale", "DEF")


def _define(schema: str, reference_of: Callable[..., Any]) -> Callable[[Callable[..., Any]], None]:
    """Define an operation by its schema and reference; the function decorated says its results' shapes."""
    name = schema.split("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, reference_of, "CompositeExplicitAutograd")
    return lambda fake: torch.library.register_fake(f"moescale::{name}", fake, lib=_LIBRARY)


# Scores of logits_TE (softmax or sigmoid) and each token's ``active`` best experts by score + bias_E among allowed_TE;
# ties go to the lower expert. weight_TK is scale * score, ``normalized`` over the selected. p is the softmax, or the
# sigmoid's share of its sum (DeepSeek-V3, 2412.19437, eq. 17-20): scored_BE sums it over each sequence's real tokens,
# visits_BE counts their visits, entropy_T is its entropy. Masked tokens go nowhere and count nowhere.
@_define(
    "route(Tensor logits_TE, Tensor? bias_E, Tensor? allowed_TE, Tensor? mask_T, int sequences, bool batch_first, "
    "int active, bool sigmoid, bool normalized, float scale) "
    "-> (Tensor weight_TK, Tensor index_TK, Tensor logsumexp_T, Tensor scored_BE, Tensor visits_BE, Tensor entropy_T)",
    reference.route,
)
def _(logits_TE, bias_E, allowed_TE, mask_T, sequences, batch_first, active, sigmoid, normalized, scale):
    tokens, experts = logits_TE.shape
    return (
        logits_TE.new_empty(tokens, active),
        logits_TE.new_empty(tokens, active, dtype=torch.int64),
        logits_TE.new_empty(tokens),
        logits_TE.new_empty(sequences, experts),
        logits_TE.new_empty(sequences, experts),
        logits_TE.new_empty(tokens),
    )


@_define(
    "route_backward(Tensor grad_weight_TK, Tensor grad_logsumexp_T, Tensor grad_scored_BE, Tensor logits_TE, "
    "Tensor index_TK, Tensor logsumexp_T, Tensor? mask_T, bool batch_first, bool sigmoid, bool normalized, "
    "float scale) -> Tensor",
    reference.route_backward,
)
def _(grad_weight_TK, grad_logsumexp_T, grad_scored_BE, logits_TE, *unused):
    return torch.empty_like(logits_TE)


# Rows ordered by expert, then by visit (t * K + k). limit < 0: each expert's visits rounded up to ``multiple``, with
# visit_R as long as the rows can become and -1 behind the last; limit >= 0: exactly ``limit`` rows an expert, later
# visits dropped. Nothing is read back to the host, so the number of rows in use is ends_E[-1], not visit_R's length.
@_define(
    "assign(Tensor index_TK, int experts, int multiple, int limit) "
    "-> (Tensor counts_E, Tensor ends_E, Tensor visit_R, Tensor row_TK)",
    reference.assign,
)
def _(index_TK, experts, multiple, limit):
    rows = index_TK.numel() + experts * (multiple - 1) if limit < 0 else experts * limit
    return (
        index_TK.new_empty(experts),
        index_TK.new_empty(experts, dtype=torch.int32),
        index_TK.new_empty(rows),
        torch.empty_like(index_TK),
    )


# Each visit's token, in the visit's row. ``visit_R`` and ``row_TK`` say the same: kernels go by row or by token.
@_define("permute(Tensor x_TD, Tensor visit_R, Tensor row_TK) -> Tensor", reference.permute)
def _(x_TD, visit_R, row_TK):
    return x_TD.new_empty(visit_R.shape[0], x_TD.shape[1])


@_define("combine(Tensor rows_RD, Tensor row_TK, Tensor? weight_TK) -> Tensor", reference.combine)
def _(rows_RD, row_TK, weight_TK):
    return rows_RD.new_empty(row_TK.shape[0], rows_RD.shape[1])


@_define(
    "combine_backward(Tensor grad_TD, Tensor rows_RD, Tensor visit_R, Tensor weight_TK) "
    "-> (Tensor grad_rows_RD, Tensor grad_weight_TK)",
    reference.combine_backward,
)
def _(grad_TD, rows_RD, visit_R, weight_TK):
    return torch.empty_like(rows_RD), torch.empty_like(weight_TK)


@_define("swiglu(Tensor gate_up, Tensor? weight_TK, Tensor? visit_R) -> Tensor", reference.swiglu)
def _(gate_up, weight_TK, visit_R):
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


@_define(
    "swiglu_backward(Tensor(a!) grad_act_RF, Tensor gate_up, Tensor? weight_TK, Tensor? visit_R) "
    "-> (Tensor grad_gate_up, Tensor grad_weight_TK)",
    reference.swiglu_backward,
)
def _(grad_act_RF, gate_up, weight_TK, visit_R):
    wide = torch.promote_types(gate_up.dtype, torch.float32)
    grad_weight = gate_up.new_empty(0, dtype=wide) if weight_TK is None else torch.empty_like(weight_TK)
    return torch.empty_like(gate_up), grad_weight


OPERATIONS = (
    "route",
    "route_backward",
    "assign",
    "permute",
    "combine",
    "combine_backward",
    "swiglu",
    "swiglu_backward",
)
unavailable = load_native()  # why the native kernels are not in use, or ""

# Called directly by the autograd functions: an overload is looked up once, not at every call.
route = torch.ops.moescale.route.default
route_backward = torch.ops.moescale.route_backward.default
assign = torch.ops.moescale.assign.default
permute = torch.ops.moescale.permute.default
combine = torch.ops.moescale.combine.default
combine_backward = torch.ops.moescale.combine_backward.default
swiglu = torch.ops.moescale.swiglu.default
swiglu_backward = torch.ops.moescale.swiglu_backward.default


def implementation(name: str, device: Literal["CPU", "CUDA"]) -> Literal["native", "reference"]:
    """Which implementation of operation ``name`` serves tensors of ``device``."""
    native: bool = torch._C._dispatch_has_kernel_for_dispatch_key(f"moescale::{name}", device)
    return "native" if native else "reference"
