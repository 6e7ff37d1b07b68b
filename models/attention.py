"""Rotary positions and core attention for Megatron layer specs, through torch's scaled-dot-product kernel."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RotaryCausalAttention(nn.Module):
    """Causal attention without a materialised score matrix: ``[S, B, heads, width] -> [S, B, heads * width]``.

    Rotary positions (Su et al. 2021, 2104.09864, eq. 34, feature i turning with feature i + width / 2) are applied
    here, from tables that are made once for a sequence length; Megatron makes cosines and sines anew for every tensor
    of every layer. Only the first ``rotary`` features of a head turn (all, as a rule). Keys and values may have fewer
    heads (grouped-query attention, 2305.13245). Masks other than causal are refused.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        *,
        base: float,
        rotary: int,
        **unused: Any,
    ):
        super().__init__()
        self.base = base
        self.rotary = rotary
        self._tables: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]] = {}

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **unused: Any
    ) -> Tensor:
        if attention_mask is not None:
            raise ValueError("attention is causal over whole sequences; an attention mask cannot be given")
        dtype = query.dtype
        cosine, sine = self._table(query)
        q_BHSd, k_BHSd, v_BHSd = (
            t.permute(1, 2, 0, 3) for t in (_rotate(query, cosine, sine), _rotate(key, cosine, sine), value)
        )
        if dtype == torch.bfloat16 and query.device.type == "cpu":
            # torch's CPU kernel is slower in bf16 than in fp32, backward most of all (docs/findings.md).
            q_BHSd, k_BHSd, v_BHSd = q_BHSd.float(), k_BHSd.float(), v_BHSd.float()
        grouped = key.shape[2] != query.shape[2]
        out_BHSd = F.scaled_dot_product_attention(q_BHSd, k_BHSd, v_BHSd, is_causal=True, enable_gqa=grouped)
        return out_BHSd.permute(2, 0, 1, 3).flatten(2).to(dtype)

    def _table(self, x_SBHd: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines, ``[S, 1, 1, rotary]`` in the dtype of ``x``."""
        length, width = x_SBHd.shape[0], self.rotary
        where = (length, x_SBHd.dtype)
        if where not in self._tables:
            half = torch.arange(width // 2, device=x_SBHd.device, dtype=torch.float32)
            angle = torch.outer(
                torch.arange(length, device=x_SBHd.device, dtype=torch.float32), self.base ** (-2 * half / width)
            )
            cosine = torch.cat([angle.cos(), angle.cos()], dim=-1)[:, None, None]
            sine = torch.cat([-angle.sin(), angle.sin()], dim=-1)[:, None, None]
            self._tables = {where: (cosine.to(x_SBHd.dtype), sine.to(x_SBHd.dtype))}
        return self._tables[where]


def _rotate(x_SBHd: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn the two halves of the features that rotate against each other; rolling by half the width swaps them."""
    rotary = cosine.shape[-1]
    if rotary < x_SBHd.shape[-1]:
        return torch.cat([_rotate(x_SBHd[..., :rotary], cosine, sine), x_SBHd[..., rotary:]], dim=-1)
    return x_SBHd * cosine + x_SBHd.roll(x_SBHd.shape[-1] // 2, dims=-1) * sine
