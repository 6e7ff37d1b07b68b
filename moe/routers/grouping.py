"""The tokens among which experts choose, or are balanced: those of equal position, or those of a sequence.

Groups of equal position couple the sequences of a micro-batch and leave each causal. Groups of a sequence couple its
earlier tokens to its later ones, and are whole on every rank: under sequence parallelism they are gathered.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..keyed import first_position
from ..routing import TokenGrid


@dataclass(frozen=True)
class Groups:
    """Values of tokens by group.

    Attributes:
        by_position: groups of equal position, one for each position on this rank; else one for each sequence.
        tokens: tokens on this rank.
    """

    grid: TokenGrid
    by_position: bool
    tokens: int

    @property
    def _length(self) -> int:
        return self.tokens // max(self.grid.sequences, 1)

    def numbers(self, device: torch.device) -> Tensor:
        """Number of each group, ``[G]``: its position; 0 for sequences, which no layout numbers like another."""
        if not self.by_position:
            return torch.zeros(self.grid.sequences, dtype=torch.int64, device=device)
        first = first_position(self.grid, self._length)
        return torch.arange(first, first + self._length, device=device)

    def gather(self, values_TE: Tensor) -> Tensor:
        """``[T, E] -> [G, N, E]``: all N members of each group; -inf for masked tokens. Not differentiable."""
        grid, experts = self.grid, values_TE.shape[1]
        if grid.mask_T is not None:
            values_TE = values_TE.masked_fill(~grid.mask_T.unsqueeze(-1), -torch.inf)
        if grid.batch_first:
            values_SBE = values_TE.view(grid.sequences, self._length, experts).transpose(0, 1)
        else:
            values_SBE = values_TE.view(self._length, grid.sequences, experts)
        if self.by_position:
            return values_SBE
        if grid.group is not None:
            mine = values_SBE.contiguous()
            parts = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size(grid.group))]
            torch.distributed.all_gather(parts, mine, group=grid.group)
            values_SBE = torch.cat(parts)
        return values_SBE.transpose(0, 1)

    def scatter(self, values_GNE: Tensor) -> Tensor:
        """``[G, N, E] -> [T, E]``: what belongs to this rank's tokens."""
        if self.by_position:
            values_SBE = values_GNE
        else:
            first = first_position(self.grid, self._length)
            values_SBE = values_GNE.transpose(0, 1)[first : first + self._length]
        ordered = values_SBE.transpose(0, 1) if self.grid.batch_first else values_SBE
        return ordered.reshape(self.tokens, values_GNE.shape[-1])
