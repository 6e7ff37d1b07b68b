"""Token choice: each token visits the experts that it scores highest."""

import torch
from torch import Tensor

from ..context import RoutingContext
from ..routing import Routing, TokenGrid, route
from .base import ScoredRouter


class TopKRouter(ScoredRouter):
    """Top-K (Shazeer et al. 2017, 1701.06538, eq. 3-5) by softmax or sigmoid scores.

    ``softmax`` weighs a visit by its probability over all experts (Switch, OLMoE); ``softmax_normalized`` divides by
    the sum over the K selected (GShard, Mixtral), which is the softmax over the selected; ``sigmoid`` and
    ``sigmoid_normalized`` score each expert alone (DeepSeek-V3, 2412.19437, eq. 13-15). With K = 1 a normalized
    weight is always 1 and the language-model loss gives the router no gradient.

    With ``groups`` a token's experts come from ``groups_active`` of them: softmax ranks groups by their best expert
    (DeepSeek-V2, 2405.04434, section 2.2.2), sigmoid by the sum of their best two (DeepSeek-V3, section 2.1.2).
    """

    def forward(
        self, x_TD: Tensor, grid: TokenGrid, context: RoutingContext | None = None, bias_E: Tensor | None = None
    ) -> Routing:
        config = self.config
        logits_TE = self.logits(x_TD, grid, context)
        return route(
            logits_TE,
            grid,
            active=config.active,
            score=config.score,
            scale=config.weight_scale,
            bias_E=bias_E,
            allowed_TE=self._of_best_groups(logits_TE.detach(), bias_E) if config.groups > 1 else None,
        )

    def _of_best_groups(self, logits_TE: Tensor, bias_E: Tensor | None) -> Tensor:
        """Whether each expert is of a group that the token may visit; of equal groups the first."""
        config = self.config
        size = config.experts // config.groups
        sigmoid = config.score.startswith("sigmoid")
        score_TE = torch.sigmoid(logits_TE) if sigmoid else torch.softmax(logits_TE, dim=-1)
        if bias_E is not None:
            score_TE = score_TE + bias_E
        best = score_TE.view(-1, config.groups, size).topk(min(2, size) if sigmoid else 1, dim=-1).values
        order_TG = torch.sort(best.sum(dim=-1), dim=-1, descending=True, stable=True).indices
        open_TG = torch.zeros_like(order_TG, dtype=torch.bool)
        open_TG.scatter_(1, order_TG[:, : config.groups_active], True)
        return open_TG.repeat_interleave(size, dim=1)
