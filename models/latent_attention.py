"""Multi-head latent attention for Megatron layer specs: Megatron's, with whole projections to the latents."""

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import MLATransformerConfig
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from ..parallel.sums import same_then_split_use


def tell_whether_transformer_engine_is_there() -> None:
    """Without it Megatron's latent attention of 0.16 takes it for present, and asks isinstance of mocks."""
    multi_latent_attention.HAVE_TE = isinstance(multi_latent_attention.TELinear, type)


class WholeProjection(nn.Module):
    """A projection to a latent, which every tensor rank holds whole: ``[S, B, D] -> [S, B, rows]``, no bias.

    Under sequence parallelism S is this rank's part of the sequence, and gradients are summed with those of the norms.

    Args:
        summed: the last so many features are used by each rank for its own heads alone, so that the gradients of all
            ranks add up. What comes before goes through a column-parallel projection, which sums by itself.
        group: ranks that hold other heads and see the same tokens; None: there are none.
    """

    def __init__(self, rows: int, config: Any, *, summed: int = 0, group: ProcessGroup | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, config.hidden_size, dtype=config.params_dtype))
        self.summed = summed
        self.group = group

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """As Megatron's linear layers: ``(output, bias)``."""
        y = F.linear(x, self.weight)
        if self.summed and self.group is not None:
            own, shared = y.split([y.shape[-1] - self.summed, self.summed], dim=-1)
            y = torch.cat([own, same_then_split_use(shared, self.group)], dim=-1)
        return y, None


class LatentAttention(MLASelfAttention):
    """`MLASelfAttention` of which only the constructor is ours.

    Megatron's own, without Transformer Engine, cuts the projections to the latents over tensor ranks and gathers their
    outputs. The key that all heads share is then gathered too, and the gradient of each rank's heads is never summed:
    docs/layout.md. With whole projections its `forward` does what it does for Transformer Engine's.

    Args:
        norm_eps: what the norms of the latents add.
    """

    def __init__(
        self,
        config: MLATransformerConfig,
        submodules: MLASelfAttentionSubmodules,
        layer_number: int,
        attn_mask_type: AttnMaskType = AttnMaskType.causal,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        norm_eps: float,
    ):
        tell_whether_transformer_engine_is_there()
        super(MLASelfAttention, self).__init__(
            config, submodules, layer_number, attn_mask_type, "self", cp_comm_type, pg_collection
        )
        heads, turning = config.num_attention_heads, config.qk_pos_emb_head_dim
        same_tokens = self.tp_group if self.tp_group.size() > 1 and not config.sequence_parallel else None
        if config.q_lora_rank is None:
            self.linear_q_proj = self._cut(submodules.linear_q_proj, config.hidden_size, heads * self.q_head_dim)
        else:
            self.linear_q_down_proj = WholeProjection(config.q_lora_rank, config)
            self.q_layernorm = build_module(submodules.q_layernorm, config, config.q_lora_rank, norm_eps)
            self.linear_q_up_proj = self._cut(submodules.linear_q_up_proj, config.q_lora_rank, heads * self.q_head_dim)
        self.linear_kv_down_proj = WholeProjection(
            config.kv_lora_rank + turning, config, summed=turning, group=same_tokens
        )
        self.kv_layernorm = build_module(submodules.kv_layernorm, config, config.kv_lora_rank, norm_eps)
        rows = heads * (config.qk_head_dim + config.v_head_dim)
        self.linear_kv_up_proj = self._cut(submodules.linear_kv_up_proj, config.kv_lora_rank, rows)

    def _cut(self, module: Any, columns: int, rows: int) -> nn.Module:
        """A projection whose rows, head by head, are cut over tensor ranks."""
        made: nn.Module = build_module(
            module,
            columns,
            rows,
            config=self.config,
            init_method=self.config.init_method,
            gather_output=False,
            bias=False,
            skip_bias_add=False,
            is_expert=False,
            tp_group=self.tp_group,
        )
        return made
