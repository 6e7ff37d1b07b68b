"""Operands of the native operations as a mixture layer calls them, and what runs them."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from ..moe import ops, reference
from ..moe.dispatch import Assignment
from ..moe.experts import row_multiple
from .device import DEVICE
from .floor import DTYPES
from .layer_cases import LayerCase

WARM_UP = 3  # steps


def operands(operation: str, case: LayerCase) -> tuple[Any, ...]:
    """Arguments of ``operation`` under natural routing. Scores are float32, rows are of the case's dtype."""
    draw = torch.Generator(DEVICE).manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = DTYPES[case.dtype]) -> Tensor:
        return torch.randn(shape, generator=draw, device=DEVICE).to(dtype)

    tokens, experts, active = case.tokens, case.experts, case.active
    logits_TE = random(tokens, experts, dtype=torch.float32)
    weight_TK, index_TK, logsumexp_T, scored_BE, _, _ = reference.route(
        logits_TE, None, None, None, case.batch, False, active, False, True, 1.0
    )
    if operation == "route":
        return logits_TE, None, None, None, case.batch, False, active, False, True, 1.0
    if operation == "route_backward":
        grad_weight_TK = random(tokens, active, dtype=torch.float32)
        grads = (grad_weight_TK, torch.ones_like(logsumexp_T), torch.ones_like(scored_BE))
        return *grads, logits_TE, index_TK, logsumexp_T, None, False, False, True, 1.0
    x_TD = random(tokens, case.width)
    multiple = row_multiple(x_TD)
    if operation == "assign":
        return index_TK, experts, multiple, -1
    assignment = Assignment.build(index_TK, experts, multiple=multiple)
    rows = len(assignment.visit_R)
    if operation == "permute":
        return x_TD, assignment.visit_R, assignment.row_TK
    if operation == "combine":
        return random(rows, case.width), assignment.row_TK, weight_TK
    if operation == "combine_backward":
        return x_TD, random(rows, case.width), assignment.visit_R, weight_TK
    gate_up = random(rows, 2 * case.expert_width)
    if operation == "swiglu":
        return gate_up, weight_TK, assignment.visit_R
    assert operation == "swiglu_backward", operation
    return random(rows, case.expert_width), gate_up, weight_TK, assignment.visit_R


def bytes_moved(operation: str, arguments: tuple[Any, ...]) -> int:
    """What ``operation`` has to move: every operand read once, every result written once."""
    results = getattr(reference, operation)(*arguments)
    written = list(results) if isinstance(results, tuple) else [results]
    if operation == "swiglu_backward":
        written.append(arguments[0])  # overwritten
    tensors = [tensor for tensor in (*arguments, *written) if isinstance(tensor, Tensor)]
    return sum(tensor.nbytes for tensor in tensors)


class Operation:
    """A `Stepper`: one operation, native or its reference."""

    def __init__(self, case: Mapping[str, Any], operation: str, implementation: str):
        self._arguments = operands(operation, LayerCase(**case))
        self.bytes_moved: int | None = bytes_moved(operation, self._arguments)
        device: Literal["CPU", "CUDA"] = "CUDA" if self._arguments[0].is_cuda else "CPU"
        if implementation == "native" and ops.implementation(operation, device) != "native":
            raise RuntimeError(f"{operation} has no native implementation for {device}: {ops.unavailable}")
        self._function: Callable[..., Any] = getattr(ops if implementation == "native" else reference, operation)
        self._note = implementation

    def warm_up(self) -> str:
        for _ in range(WARM_UP):
            self.step()
        return self._note

    def step(self) -> None:
        self._function(*self._arguments)

    def close(self) -> None:
        pass


class Copy:
    """A `Stepper`: one warm buffer copied to another, which moves as many bytes as the operation."""

    def __init__(self, case: Mapping[str, Any], operation: str):
        arguments = operands(operation, LayerCase(**case))
        self.bytes_moved: int | None = bytes_moved(operation, arguments)
        device = arguments[0].device
        self.source = torch.ones(self.bytes_moved // 2, dtype=torch.uint8, device=device)
        self.target = torch.zeros_like(self.source)

    def warm_up(self) -> str:
        for _ in range(WARM_UP):
            self.step()
        return "a copy of as many bytes"

    def step(self) -> None:
        self.target.copy_(self.source)

    def close(self) -> None:
        pass
