"""Forced routing: random experts with given loads, for measuring what dispatch and imbalance cost."""

import torch
from torch import Tensor

from .. import keyed
from ..context import RoutingContext
from ..routing import Routing, TokenGrid
from .base import Router, without_scores


class ForcedRouter(Router):
    """Each token visits K different experts at random, expert i with chances proportional to (i + 1)^-skew (Zipf).

    A function of (seed, step, sample, position, layer); without a context, of (place in the batch, position, layer).
    Drawn without replacement by Gumbel top-K (Kool et al. 2019, 1903.06059), so that with K > 1 loads are
    less skewed than chances. Nothing is learnt; each visit weighs 1 / K.
    """

    def forward(
        self, x_TD: Tensor, grid: TokenGrid, context: RoutingContext | None = None, bias_E: Tensor | None = None
    ) -> Routing:
        config = self.config
        key_T = keyed.token_keys(context, grid, len(x_TD), self.layer, x_TD.device)
        uniform_TE = keyed.uniform(keyed.numbers_of(key_T, config.experts))
        rank_E = torch.arange(1, config.experts + 1, device=x_TD.device)
        wanted_TE = -torch.log(-torch.log(uniform_TE)) - config.skew * torch.log(rank_E)
        index_TK = wanted_TE.sort(dim=-1, descending=True, stable=True).indices[:, : config.active]
        return without_scores(index_TK, grid, config.experts, config.weight_scale / config.active)
