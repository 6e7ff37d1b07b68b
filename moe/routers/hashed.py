"""Hash layers: a token's id says which experts it visits."""

import torch
from torch import Tensor

from .. import keyed
from ..context import RoutingContext
from ..routing import Routing, TokenGrid
from .base import Router, without_scores

_SEED = 0  # the assignment is part of the architecture, not of a run


class HashRouter(Router):
    """Balanced hash routing (Roller et al. 2021, 2106.04426, "balanced assignment"), drawn anew for each layer.

    Each run of E consecutive ids (from a multiple of E) is spread evenly: a random permutation of the experts, of
    which every id takes K, one place further than its neighbour. So each expert serves K of every E ids; tokenizers
    that number pieces by frequency make the loads of real text nearly equal too, which the paper reaches with a table
    of frequencies. Nothing is learnt; each visit weighs 1 / K.
    """

    def forward(
        self, x_TD: Tensor, grid: TokenGrid, context: RoutingContext | None = None, bias_E: Tensor | None = None
    ) -> Routing:
        config = self.config
        id_T = self._ids(context, grid, len(x_TD))
        return without_scores(self.experts_of(id_T), grid, config.experts, config.weight_scale / config.active)

    def experts_of(self, id_T: Tensor) -> Tensor:
        """Experts of token ids, ``[T] -> [T, K]``."""
        experts, device = self.config.experts, id_T.device
        key_T = keyed.extend(keyed.key_of(_SEED, self.layer), id_T // experts)
        order_TE = keyed.numbers_of(key_T, experts).argsort(dim=-1, stable=True)
        place_TK = (id_T.unsqueeze(-1) + torch.arange(self.config.active, device=device)) % experts
        return order_TE.gather(1, place_TK)

    def _ids(self, context: RoutingContext | None, grid: TokenGrid, tokens: int) -> Tensor:
        if context is None or context.token_ids_BS is None:
            raise ValueError(
                "moe.router hash needs the tokens' ids: call the layer with context=RoutingContext(token_ids_BS=...)"
            )
        length = tokens // max(grid.sequences, 1)
        first = keyed.first_position(grid, length)
        ranks = 1 if grid.group is None else torch.distributed.get_world_size(grid.group)
        if context.token_ids_BS.shape != (grid.sequences, length * ranks):
            raise ValueError(
                f"context.token_ids_BS has shape {tuple(context.token_ids_BS.shape)}; expected are the whole "
                f"sequences, {(grid.sequences, length * ranks)}"
            )
        return keyed.flat(context.token_ids_BS[:, first : first + length], grid)
