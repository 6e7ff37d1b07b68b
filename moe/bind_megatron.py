"""`MoELayer` as the ``mlp`` of a Megatron-core layer spec (0.16: ``ModuleSpec(module=MegatronMoE, params=...)``)."""

from typing import Any

import torch
from megatron.core.tensor_parallel.random import is_checkpointing
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor
from torch.distributed import ProcessGroup

from ..parallel.exchange import Exchange
from .config import MoEConfig
from .context import ContextQueue
from .layer import MoELayer


class MegatronMoE(MoELayer):
    """Takes ``[S, B, D]`` and returns ``(hidden, None)`` as Megatron's layers do.

    The auxiliary losses enter the backward pass through `MoEAuxLossAutoScaler`, so they work on every pipeline
    stage. The schedule divides them by the number of micro-batches only if ``config.num_moe_experts`` is set.

    Megatron passes hidden states alone. A program whose routing needs more (docs/moe.md) says
    ``layer.contexts.begin(context)`` before the forward pass of each micro-batch.
    """

    def __init__(
        self,
        config: Any,
        *,
        moe: MoEConfig,
        exchange: Exchange | None = None,
        exchange_chunks: int = 1,
        sequence_group: ProcessGroup | None = None,
        **unused: Any,
    ):
        super().__init__(
            config.hidden_size,
            moe,
            exchange=exchange,
            exchange_chunks=exchange_chunks,
            sequence_group=sequence_group,
        )
        self.contexts = ContextQueue()

    def set_layer_number(self, number: int) -> None:
        """Called by Megatron's layer with its global number, which counts from 1."""
        self.router.layer = number - 1

    def forward(self, x: Tensor, padding_mask: Tensor | None = None, **unused: Any) -> tuple[Tensor, None]:  # type: ignore[override]
        """``padding_mask`` is Megatron's: ``[B, S]``, True for padding."""
        mask = None if padding_mask is None else ~padding_mask.transpose(0, 1)
        output = super().forward(x, mask, self.contexts.take(is_checkpointing()))
        if not torch.is_grad_enabled():
            return output.hidden, None
        return MoEAuxLossAutoScaler.apply(output.hidden, output.loss), None
