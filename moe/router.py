"""Routers: which experts a token visits, and with which weights.

A router is a module from tokens to a `Routing`. It declares ``causal``: whether a token's routing is independent of
later tokens of its sequence. Scores are computed in float32 whatever the model's dtype (Fedus et al. 2021,
section 2.4: routing in low precision destabilises training).
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Routing:
    """What a router decided for T tokens.

    Attributes:
        index_TK: expert of each visit, int64.
        weight_TK: weight of each visit in the output, float32, differentiable.
        probs_TE: the router's probabilities, float32, differentiable.
        logsumexp_T: log-partition of the scores, float32, differentiable.
        logits_TE: the scores before the softmax, float32.
    """

    index_TK: Tensor
    weight_TK: Tensor
    probs_TE: Tensor
    logsumexp_T: Tensor
    logits_TE: Tensor


class Router(Protocol):
    """Anything that routes."""

    causal: bool

    def __call__(self, x_TD: Tensor) -> Routing: ...


class TopKRouter(nn.Module):
    """Token choice: each token visits the K experts of highest softmax probability (Shazeer et al. 2017, eq. 3-5).

    Args:
        score: ``softmax`` weighs a visit by its probability over all experts (Switch, OLMoE);
            ``softmax_normalized`` divides by the sum over the K selected (GShard, Mixtral). With K = 1 the
            latter is always 1 and gives the router no gradient from the language-model loss.
    """

    causal = True

    def __init__(
        self, width: int, experts: int, active: int, score: Literal["softmax", "softmax_normalized"] = "softmax"
    ):
        super().__init__()
        self.active = active
        self.score = score
        self.weight = nn.Parameter(torch.empty(experts, width))

    def forward(self, x_TD: Tensor) -> Routing:
        logits_TE = F.linear(x_TD.float(), self.weight.float())
        logsumexp_T = torch.logsumexp(logits_TE, dim=-1)
        probs_TE = torch.exp(logits_TE - logsumexp_T.unsqueeze(-1))
        weight_TK, index_TK = torch.topk(probs_TE, self.active, dim=-1)
        if self.score == "softmax_normalized":
            weight_TK = weight_TK / weight_TK.sum(dim=-1, keepdim=True)
        return Routing(index_TK, weight_TK, probs_TE, logsumexp_T, logits_TE)
