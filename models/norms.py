"""RMSNorm for Megatron layer specs, with the markers that sequence parallelism needs."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ..parallel.sums import sum_then_split_use


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension (Zhang & Sennrich 2019, eq. 4), one gain for each feature.

    Megatron's own wrapper refuses sequence parallelism, which only needs the gain's gradient summed over tensor
    ranks; parallel/roles.py says which.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **unused: Any):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


class FullRMSNorm(nn.Module):
    """RMSNorm of queries or keys over all heads at once (OLMoE, 2409.02060, section 4.2.5).

    Input ``[S, B, heads on this rank, head width]``; the mean square runs over the heads of all tensor ranks.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, *, heads: int, group: ProcessGroup | None):
        super().__init__()
        self.eps = eps
        self.group = group
        ranks = 1 if group is None else torch.distributed.get_world_size(group)
        self.features = heads * hidden_size
        self.weight = nn.Parameter(torch.ones(heads // ranks, hidden_size, dtype=config.params_dtype))

    def forward(self, x: Tensor) -> Tensor:
        squares = sum_then_split_use(x.float().square().sum(dim=(-2, -1), keepdim=True), self.group)
        return (x * torch.rsqrt(squares / self.features + self.eps)).to(x.dtype) * self.weight
