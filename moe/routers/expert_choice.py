"""Expert choice: each expert takes the tokens of a group that score highest for it."""

import torch
from torch import Tensor

from ..config import MoEConfig
from ..context import RoutingContext
from ..routing import Routing, TokenGrid, route
from .base import ScoredRouter
from .grouping import Groups


class ExpertChoiceRouter(ScoredRouter):
    """Expert choice (Zhou et al. 2022, 2202.09368, eq. 1-2): loads are equal by construction, and a token visits K
    experts on average, any number of them in particular.

    Of a group of n tokens the experts take n K in all. Where n K / E is not whole, they take turns in taking one
    more, shifted by the group's place, so that no expert is favoured.

    In groups of equal position the choice is causal. In groups of a sequence a later token can push out an earlier
    one: what the model knows of the future lowers its loss and is not there when it generates text.
    """

    def __init__(self, width: int, config: MoEConfig, layer: int):
        super().__init__(width, config, layer)
        self.causal = config.grouping == "position"

    def forward(
        self, x_TD: Tensor, grid: TokenGrid, context: RoutingContext | None = None, bias_E: Tensor | None = None
    ) -> Routing:
        logits_TE = self.logits(x_TD, grid, context)
        chosen_TE = self._chosen(logits_TE.detach(), grid)
        most = int(chosen_TE.sum(dim=-1).max()) if len(x_TD) else 0
        return route(
            logits_TE,
            grid,
            active=max(most, 1),
            score=self.config.score,
            scale=self.config.weight_scale,
            allowed_TE=chosen_TE,
        )

    def _chosen(self, logits_TE: Tensor, grid: TokenGrid) -> Tensor:
        config = self.config
        sigmoid = config.score.startswith("sigmoid")
        score_TE = torch.sigmoid(logits_TE) if sigmoid else torch.softmax(logits_TE, dim=-1)
        groups = Groups(grid, self.causal, len(logits_TE))
        score_GNE = groups.gather(score_TE)
        members, experts = score_GNE.shape[1:]
        order_GNE = torch.sort(score_GNE, dim=1, descending=True, stable=True).indices
        device = score_GNE.device
        turn_GE = (torch.arange(experts, device=device) + groups.numbers(device).unsqueeze(-1)) % experts
        real_G1 = (score_GNE[..., 0] > -torch.inf).sum(dim=1, keepdim=True)
        quota_GE = (real_G1 * config.active + turn_GE) // experts
        taken_GNE = torch.arange(members, device=device).view(1, -1, 1) < quota_GE.unsqueeze(1)
        return groups.scatter(torch.zeros_like(taken_GNE).scatter_(1, order_GNE, taken_GNE))
