"""What every router is, and what routers with scores share.

Scores are computed in float32 whatever the model's dtype (Fedus et al. 2021, Switch, section 2.4: routing in low
precision destabilises training).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import keyed
from ..config import MoEConfig
from ..context import RoutingContext
from ..routing import Routing, TokenGrid


class Router(nn.Module):
    """From tokens to the experts they visit.

    Attributes:
        causal: whether a token's routing, in training too, is independent of later tokens of its sequence.
        layer: number of the layer in the model, from 0; hashes and random numbers differ by it.
    """

    causal: bool = True

    def __init__(self, config: MoEConfig, layer: int):
        super().__init__()
        self.config = config
        self.layer = layer

    def forward(
        self, x_TD: Tensor, grid: TokenGrid, context: RoutingContext | None = None, bias_E: Tensor | None = None
    ) -> Routing:
        """Route the tokens.

        Args:
            grid: how the tokens lie in sequences. Masked ones visit nothing.
            context: see `RoutingContext`; routers that need it say so.
            bias_E: added to the scores for the selection; token choice only.

        Raises:
            ValueError: the context lacks what this router needs.
        """
        raise NotImplementedError


class ScoredRouter(Router):
    """A router with a matrix ``weight [E, D]`` that scores experts."""

    def __init__(self, width: int, config: MoEConfig, layer: int):
        super().__init__(config, layer)
        self.weight = nn.Parameter(torch.empty(config.experts, width))

    def logits(self, x_TD: Tensor, grid: TokenGrid, context: RoutingContext | None) -> Tensor:
        """``[T, E]`` float32; in training of ``x`` times uniform [1 - jitter, 1 + jitter] (Switch, input jitter)."""
        x_TD = x_TD.float()
        if self.config.jitter and self.training:
            x_TD = x_TD * self._jitter(x_TD, grid, context)
        return F.linear(x_TD, self.weight.float())

    def _jitter(self, x_TD: Tensor, grid: TokenGrid, context: RoutingContext | None) -> Tensor:
        if context is None or context.sample_B is None:
            raise ValueError(
                f"moe.jitter ({self.config.jitter:g}) needs to know the samples, so that micro-batches do not change "
                "it: call the layer with context=RoutingContext(sample_B=..., step=..., seed=...)"
            )
        tokens, width = x_TD.shape
        key_T = keyed.token_keys(context, grid, tokens, self.layer, x_TD.device)
        return 1 + self.config.jitter * (2 * keyed.uniform(keyed.numbers_of(key_T, width)) - 1)


def without_scores(index_TK: Tensor, grid: TokenGrid, experts: int, weight: float) -> Routing:
    """Every token visits the experts ``index_TK`` with one weight; there is nothing to learn or to balance."""
    tokens = index_TK.shape[0]
    visits_TE = torch.zeros(tokens, experts, device=index_TK.device).scatter_(1, index_TK, 1.0)
    nothing_T = visits_TE.new_zeros(tokens)
    weight_TK = visits_TE.new_full(index_TK.shape, weight)
    if grid.mask_T is not None:
        masked_T1 = ~grid.mask_T.unsqueeze(-1)
        index_TK, weight_TK = index_TK.masked_fill(masked_T1, -1), weight_TK.masked_fill(masked_T1, 0)
    return Routing(
        index_TK=index_TK,
        weight_TK=weight_TK,
        logsumexp_T=nothing_T,
        scored_BE=visits_TE.new_zeros(grid.sequences, experts),
        visits_BE=grid.sum_by_sequence(visits_TE),
        entropy_T=nothing_T,
    )
