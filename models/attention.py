"""Core attention for Megatron layer specs through torch's scaled-dot-product kernel."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F


class CausalAttention(nn.Module):
    """Causal attention without a materialised score matrix: ``[S, B, heads, width] -> [S, B, heads * width]``.

    Keys and values may have fewer heads (grouped-query attention, 2305.13245). Masks other than causal are refused.
    """

    def __init__(self, config: Any, layer_number: int, attn_mask_type: Any, attention_type: str, **unused: Any):
        super().__init__()

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **unused: Any
    ) -> Tensor:
        if attention_mask is not None:
            raise ValueError("attention is causal over whole sequences; an attention mask cannot be given")
        q_BHSd, k_BHSd, v_BHSd = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        grouped = key.shape[2] != query.shape[2]
        out_BHSd = F.scaled_dot_product_attention(q_BHSd, k_BHSd, v_BHSd, is_causal=True, enable_gqa=grouped)
        return out_BHSd.permute(2, 0, 1, 3).flatten(2)
