"""What a router decides, and the differentiable scoring that routers share."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from . import ops
from .reference import sequence_of_token

Score = Literal["softmax", "softmax_normalized", "sigmoid", "sigmoid_normalized"]


@dataclass(frozen=True)
class TokenGrid:
    """How T tokens lie in B sequences, and which of them are real.

    Attributes:
        sequences: number of sequences B.
        batch_first: whether tokens are ordered ``[B, S]`` instead of ``[S, B]``.
        mask_T: True for real tokens; None when all are.
        group: ranks among which the tokens of each sequence are spread (sequence parallelism), or None.
    """

    sequences: int
    batch_first: bool = False
    mask_T: Tensor | None = None
    group: ProcessGroup | None = None

    def sum_by_sequence(self, values_TE: Tensor) -> Tensor:
        """Sum over the real tokens of each sequence on this rank: ``[T, E] -> [B, E]``."""
        if self.mask_T is not None:
            values_TE = values_TE * self.mask_T.unsqueeze(-1)
        if self.batch_first:
            return values_TE.view(self.sequences, -1, values_TE.shape[-1]).sum(dim=1)
        return values_TE.view(-1, self.sequences, values_TE.shape[-1]).sum(dim=0)

    def sequence_of_token(self, tokens: int, device: torch.device) -> Tensor:
        """Index of each token's sequence, ``[T]``."""
        return sequence_of_token(tokens, self.sequences, self.batch_first, device)


@dataclass(frozen=True)
class Routing:
    """What a router decided for T tokens. K is the number of slots a token has: not every slot need be a visit.

    Attributes:
        index_TK: expert of each visit, int64; -1 where there is none (a masked token, a slot that stays empty).
        weight_TK: weight of each visit in the output, float32, differentiable; 0 where there is none.
        logsumexp_T: log-partition of the scores, float32, differentiable; 0 for masked tokens and without scores.
        scored_BE: the router's probabilities, summed over the real tokens of each sequence on this rank, float32,
            differentiable; 0 without scores.
        visits_BE: visits of the real tokens of each sequence on this rank, before any is dropped, float32.
        entropy_T: entropy of the router's probabilities, nats, float32; 0 for masked tokens and without scores.
    """

    index_TK: Tensor
    weight_TK: Tensor
    logsumexp_T: Tensor
    scored_BE: Tensor
    visits_BE: Tensor
    entropy_T: Tensor


def route(
    logits_TE: Tensor,
    grid: TokenGrid,
    *,
    active: int,
    score: Score,
    scale: float = 1.0,
    bias_E: Tensor | None = None,
    allowed_TE: Tensor | None = None,
) -> Routing:
    """Token choice: each token visits its ``active`` experts of highest score.

    Args:
        logits_TE: float32 (float64 in checks).
        score: ``softmax`` or ``sigmoid`` weighs a visit by its score; ``_normalized`` divides by the sum over the
            experts selected. A token's selection is the same with either.
        scale: what every weight is multiplied by.
        bias_E: added to the scores for the selection only.
        allowed_TE: the experts that may be selected; a token with fewer than ``active`` of them gets empty slots.
    """
    sigmoid, normalized = score.startswith("sigmoid"), score.endswith("normalized")
    return Routing(*_Route.apply(logits_TE, bias_E, allowed_TE, grid, active, sigmoid, normalized, scale))


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_TE: Tensor,
        bias_E: Tensor | None,
        allowed_TE: Tensor | None,
        grid: TokenGrid,
        active: int,
        sigmoid: bool,
        normalized: bool,
        scale: float,
    ) -> tuple[Tensor, ...]:
        logits_TE = logits_TE.contiguous()
        weight_TK, index_TK, logsumexp_T, scored_BE, visits_BE, entropy_T = ops.route(
            logits_TE, bias_E, allowed_TE, grid.mask_T, grid.sequences, grid.batch_first,
            active, sigmoid, normalized, scale,
        )  # fmt: skip
        ctx.save_for_backward(logits_TE, index_TK, logsumexp_T, grid.mask_T)
        ctx.settings = (grid.batch_first, sigmoid, normalized, scale)
        ctx.mark_non_differentiable(index_TK, visits_BE, entropy_T)
        return index_TK, weight_TK, logsumexp_T, scored_BE, visits_BE, entropy_T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        _, grad_weight_TK, grad_logsumexp_T, grad_scored_BE, _, _ = gradients
        grad_logits_TE = ops.route_backward(
            grad_weight_TK.contiguous(), grad_logsumexp_T.contiguous(), grad_scored_BE.contiguous(),
            *ctx.saved_tensors, *ctx.settings,
        )  # fmt: skip
        return grad_logits_TE, None, None, None, None, None, None, None
