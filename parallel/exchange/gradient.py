"""The gradient of an exchange is the exchange back."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Send = Callable[[Tensor, Sequence[int], Sequence[int]], Tensor]


def differentiable(send: Send, rows_RD: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
    """``send(rows_RD, sent, received)``, which moves rows between ranks, with its gradient."""
    return _Sent.apply(rows_RD, list(sent), list(received), send)


class _Sent(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], send: Send) -> Tensor:
        ctx.route = (sent, received, send)
        return send(rows, sent, received)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        sent, received, send = ctx.route
        return send(gradients[0], received, sent), None, None, None
