"""Sinkhorn routing: scores are balanced before each token takes its best experts."""

import torch
from torch import Tensor

from ..config import MoEConfig
from ..context import RoutingContext
from ..routing import Routing, TokenGrid, route
from .base import ScoredRouter
from .grouping import Groups

# Rounds of normalising columns and rows. A fixed number, so that no test for convergence is read from the device;
# after four of them the choice of experts no longer changes (docs/moe.md).
ROUNDS = 4


class SinkhornRouter(ScoredRouter):
    """Sinkhorn-BASE (Clark et al. 2022, 2202.01169, "S-BASE").

    In training the experts are chosen from a balanced copy of the scores, the entropy-regularised transport plan
    between the tokens of a group and the experts; rounding it to K experts a token leaves loads nearly equal. In
    evaluation each token takes the experts it scores highest. Visits weigh what the unbalanced scores say, and the
    gradient goes through those alone.

    In groups of equal position the choice is causal. In groups of a sequence later tokens decide on earlier ones in
    training; evaluation is causal with either.
    """

    def __init__(self, width: int, config: MoEConfig, layer: int):
        super().__init__(width, config, layer)
        self.causal = config.grouping == "position"

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
            allowed_TE=self._balanced_choice(logits_TE.detach(), grid) if self.training else None,
        )

    def _balanced_choice(self, logits_TE: Tensor, grid: TokenGrid) -> Tensor:
        """Whether each expert is among a token's K best after balancing."""
        groups = Groups(grid, self.causal, len(logits_TE))
        logits_GNE = groups.gather(logits_TE)
        plan_TE = groups.scatter(logits_GNE + balancing_offsets(logits_GNE))
        order_TE = torch.sort(plan_TE, dim=-1, descending=True, stable=True).indices
        chosen_TE = torch.zeros_like(order_TE, dtype=torch.bool)
        return chosen_TE.scatter_(1, order_TE[:, : self.config.active], True)


def balancing_offsets(logits_GNE: Tensor) -> Tensor:
    """What to add to each expert's logits so that all experts are wanted alike: ``[G, 1, E]``.

    Of the plan exp(logits + u + v), whose rows (tokens) have one sum and whose columns (experts) have another, a
    token's choice needs v alone (Sinkhorn & Knopp 1967; Cuturi 2013, 1306.0895, in logarithms). Rows of -inf are
    masked tokens and have no share.
    """
    real_GN1 = logits_GNE[..., :1] > -torch.inf
    logits_GNE = logits_GNE.masked_fill(~real_GN1, 0)
    v_G1E = logits_GNE.new_zeros(logits_GNE.shape[0], 1, logits_GNE.shape[2])
    for _ in range(ROUNDS):
        u_GN1 = -torch.logsumexp(logits_GNE + v_G1E, dim=2, keepdim=True)
        v_G1E = -torch.logsumexp(logits_GNE + u_GN1.masked_fill(~real_GN1, -torch.inf), dim=1, keepdim=True)
        v_G1E = v_G1E.nan_to_num(posinf=0.0)  # a group without real tokens
    return v_G1E
