"""What keeps routing healthy: the load-balance loss, the z-loss and the bias that steers without a loss.

The load-balance loss is ``E * sum_i f_i P_i``: f_i is the share of visits that go to expert i, P_i the mean probability
that the router gives it, and 1 is perfect balance (Fedus et al. 2021, 2101.03961, eq. 4-6, here with K visits a token).
Over which tokens f and P are taken is its scope:

- ``sequence``: over each sequence; the loss is the mean over sequences (DeepSeek-V2, 2405.04434, section 2.2.3).
- ``global``: f over the whole batch of the previous optimizer step, P over each sequence. Qiu et al. (2501.11873) take
  f of the present batch, which couples every micro-batch to all others; with the previous one the loss is linear in P.
- ``micro_batch``: over the micro-batch, as Megatron-LM and transformers do, whatever size that happens to have.

Sequence and global scope are means over sequences, so the sum over micro-batches and ranks is the same however a batch
is cut. The micro-batch's is not: a product of two means is no mean of products.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..parallel.sums import sum_then_same_everywhere
from .config import MoEConfig
from .routing import Routing, TokenGrid


@dataclass(frozen=True)
class Losses:
    """Router losses of a micro-batch.

    Attributes:
        total: what to add to the micro-batch's mean loss on this rank, coefficients included.
        aux: load-balance loss, the same on all ranks that share the sequences. Under balance ``none`` it is that of
            sequence scope: measured, not trained on.
        z_sum: squared log-partitions, summed over the real tokens of this rank.
    """

    total: Tensor
    aux: Tensor
    z_sum: Tensor


class Balance(nn.Module):
    """The losses of one layer and what they carry from step to step.

    Both buffers are float32 whatever the model's dtype and the same on every rank that holds the layer.

    Attributes:
        bias_E: added to the scores when experts are selected, or None without ``moe.bias_rate``.
        load_E: visits of each expert in the previous optimizer step, zeros before the first; None unless the scope
            is global.
    """

    bias_E: Tensor | None
    load_E: Tensor | None

    def __init__(self, config: MoEConfig):
        super().__init__()
        self.config = config
        zeros_E = torch.zeros(config.experts, dtype=torch.float32)
        self.register_buffer("bias_E", zeros_E.clone() if config.bias_rate else None)
        self.register_buffer("load_E", zeros_E if config.balance == "global" else None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Balance":
        """Follow the model to its device and to wider types, not to narrower ones.

        In bf16's eight bits a bias would stop where its steps round away, and counts would be wrong.
        """

        def wide(buffer: Tensor) -> Tensor:
            moved = fn(buffer)
            return buffer.to(moved.device, torch.promote_types(moved.dtype, buffer.dtype))

        super()._apply(wide, recurse)
        return self

    def loss(self, routing: Routing, grid: TokenGrid) -> Losses:
        """The losses of this micro-batch."""
        scored_BE, visits_BE, tokens_B = _of_whole_sequences(routing, grid)
        aux = self._load_balance(scored_BE, visits_BE, tokens_B)
        z_sum = routing.logsumexp_T.square().sum()  # Zoph et al. 2022, ST-MoE, eq. 5
        total = self.config.z_loss * z_sum / tokens_B.sum().clamp(min=1)
        if self.config.balance != "none":
            total = total + self.config.aux_loss * aux
        return Losses(total, aux, z_sum)

    def _load_balance(self, scored_BE: Tensor, visits_BE: Tensor, tokens_B: Tensor) -> Tensor:
        if self.config.balance == "micro_batch":
            scored_BE, visits_BE = scored_BE.sum(dim=0, keepdim=True), visits_BE.sum(dim=0, keepdim=True)
            tokens_B = tokens_B.sum(dim=0, keepdim=True)
        share = _shares(visits_BE) if self.load_E is None else self._previous_shares().to(scored_BE.dtype)
        products_B = (share * scored_BE).sum(dim=-1)
        return self.config.experts * (products_B / tokens_B.clamp(min=1)).mean()

    def _previous_shares(self) -> Tensor:
        """Shares of the previous step's visits, ``[E]``; all alike before the first step."""
        assert self.load_E is not None
        return torch.where(self.load_E.sum() > 0, _shares(self.load_E), 1 / self.config.experts)

    @torch.no_grad()
    def observe(self, visits_E: Tensor) -> None:
        """Take note of the visits of an optimizer step: once a step, summed over all ranks, before any is dropped.

        The bias of an expert with fewer visits than the mean rises by ``moe.bias_rate``, of one with more it falls
        (Wang et al. 2024, 2408.15664, algorithm 1; DeepSeek-V3, 2412.19437, section 2.1.2).
        """
        if self.bias_E is not None:
            lacking_E = torch.sign(visits_E.mean() - visits_E)
            self.bias_E.add_(self.config.bias_rate * lacking_E.to(self.bias_E))
        if self.load_E is not None:
            self.load_E.copy_(visits_E)


def _shares(visits: Tensor) -> Tensor:
    """Each expert's share of the visits, ``[..., E]``; zeros where there are none."""
    return visits / visits.sum(dim=-1, keepdim=True).clamp(min=1)


def _of_whole_sequences(routing: Routing, grid: TokenGrid) -> tuple[Tensor, Tensor, Tensor]:
    """(probabilities, visits, real tokens) summed over each sequence, over all ranks that share it, in one message."""
    tokens_T1 = routing.scored_BE.new_ones(routing.index_TK.shape[0], 1)
    tokens_B1 = grid.sum_by_sequence(tokens_T1)
    sums = torch.cat([routing.scored_BE, routing.visits_BE, tokens_B1], dim=1)
    experts = routing.scored_BE.shape[1]
    scored_BE, visits_BE, tokens_B1 = sum_then_same_everywhere(sums, grid.group).split([experts, experts, 1], dim=1)
    return scored_BE, visits_BE, tokens_B1.squeeze(1)
