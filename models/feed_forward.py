"""The dense feed-forward layer for Megatron layer specs."""

from typing import Any

from megatron.core.transformer.mlp import MLP
from torch import Tensor
from torch.nn import functional as F

from ..moe.experts import feed_forward


class SwiGLU(MLP):
    """Megatron's column- and row-parallel `MLP` with the gate (Shazeer 2020, 2002.05202, eq. 6) and nothing else.

    The original adds an offset of zero to one half, which costs small models a pass over memory forward and keeps
    another tensor for the backward pass.
    """

    def forward(self, hidden_states: Tensor, **unused: Any) -> tuple[Tensor, None]:
        """``[S, B, D] -> [S, B, D]``; each tensor rank holds its share of gate over its share of up."""
        if self.config.tensor_model_parallel_size == 1:
            return feed_forward(hidden_states, self.linear_fc1.weight, self.linear_fc2.weight), None
        # Megatron's linear layers keep a sequence-parallel input cut between the passes.
        gate_up, _ = self.linear_fc1(hidden_states)
        gate, up = gate_up.chunk(2, dim=-1)
        output, _ = self.linear_fc2(F.silu(gate) * up)
        return output, None
