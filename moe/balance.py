"""Losses that keep routing healthy, and the counts they share with the statistics.

Tokens come as ``T = S * B`` (sequence-first) or ``B * S`` (batch-first); `TokenGrid` knows which, so that losses of
sequence scope are sums over whole sequences and do not depend on how a batch is cut into micro-batches.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ..parallel.exchange import sum_then_same_everywhere
from .router import Routing


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
        index_T = torch.arange(tokens, device=device)
        if self.batch_first:
            return index_T // (tokens // self.sequences)
        return index_T % self.sequences


def visits_by_sequence(routing: Routing, grid: TokenGrid) -> Tensor:
    """How often the real tokens of each sequence on this rank visit each expert: ``[B, E]`` float32."""
    tokens, experts = routing.probs_TE.shape
    cell_TK = grid.sequence_of_token(tokens, routing.index_TK.device).unsqueeze(-1) * experts + routing.index_TK
    if grid.mask_T is not None:
        cell_TK = cell_TK[grid.mask_T]
    visits = torch.bincount(cell_TK.flatten(), minlength=grid.sequences * experts)
    return visits.view(grid.sequences, experts).float()


def load_balance_loss(routing: Routing, visits_BE: Tensor, grid: TokenGrid) -> Tensor:
    """Mean over sequences of ``E * sum_i f_i P_i``; 1 when all experts are visited and scored alike.

    f_i is the share of a sequence's visits that go to expert i, P_i its mean probability (Fedus et al. 2021, eq. 4-6,
    with K visits a token; over each sequence as in DeepSeek-V2, 2405.04434, section 2.2.3).
    """
    experts = visits_BE.shape[-1]
    scored_BE = sum_then_same_everywhere(grid.sum_by_sequence(routing.probs_TE), grid.group)
    visited_BE = sum_then_same_everywhere(visits_BE, grid.group)
    visits_B = visited_BE.sum(dim=-1)
    tokens_B = visits_B / routing.index_TK.shape[-1]
    products_B = (visited_BE * scored_BE).sum(dim=-1)
    return (experts * products_B / (visits_B * tokens_B).clamp(min=1)).mean()


def z_loss_sum(routing: Routing, grid: TokenGrid) -> Tensor:
    """Sum over this rank's real tokens of the squared log-partition (Zoph et al. 2022, ST-MoE, eq. 5)."""
    squares_T = routing.logsumexp_T.square()
    if grid.mask_T is not None:
        squares_T = squares_T * grid.mask_T
    return squares_T.sum()
