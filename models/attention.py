"""Core attention and rotary positions for Megatron layer specs, through torch's scaled-dot-product kernel."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class CausalAttention(nn.Module):
    """Causal attention without a materialised score matrix: ``[S, B, heads, width] -> [S, B, heads * value width]``.

    Keys and values may have fewer heads than queries (grouped-query attention, 2305.13245), and values another width
    than keys. Masks other than causal are refused.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        *,
        softmax_scale: float | None = None,
        **unused: Any,
    ):
        super().__init__()
        self.scale = softmax_scale  # None: 1 / sqrt(width)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **unused: Any
    ) -> Tensor:
        if attention_mask is not None:
            raise ValueError("attention is causal over whole sequences; an attention mask cannot be given")
        dtype, width = query.dtype, value.shape[3]
        scale = self.scale if self.scale is not None else query.shape[3] ** -0.5
        grouped = key.shape[2] != query.shape[2]
        q_BHSd, k_BHSd, v_BHSd = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        if query.device.type == "cpu":
            if dtype == torch.bfloat16:
                # torch's CPU kernel is slower in bf16 than in fp32, backward most of all (docs/findings.md).
                q_BHSd, k_BHSd, v_BHSd = q_BHSd.float(), k_BHSd.float(), v_BHSd.float()
            # That kernel takes one width only; without it scores would be materialised.
            widest = max(query.shape[3], width)
            q_BHSd, k_BHSd, v_BHSd = (_widened(t, widest) for t in (q_BHSd, k_BHSd, v_BHSd))
        out_BHSd = F.scaled_dot_product_attention(
            q_BHSd, k_BHSd, v_BHSd, is_causal=True, scale=scale, enable_gqa=grouped
        )
        return out_BHSd[..., :width].permute(2, 0, 1, 3).flatten(2).to(dtype)


def _widened(x: Tensor, width: int) -> Tensor:
    """With zeros behind its features, which change neither a score nor what is kept of the output."""
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


class RotaryCausalAttention(CausalAttention):
    """Causal attention that applies rotary positions itself (Su et al. 2021, 2104.09864, eq. 34).

    Feature i turns with feature i + width / 2, from tables that are made once for a sequence length; Megatron makes
    cosines and sines anew for every tensor of every layer. Only the first ``rotary`` features of a head turn (all, as a
    rule).
    """

    def __init__(self, *arguments: Any, base: float, rotary: int, **keywords: Any):
        super().__init__(*arguments, **keywords)
        self.base = base
        self.rotary = rotary
        self._tables: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]] = {}

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **unused: Any
    ) -> Tensor:
        cosine, sine = self._table(query)
        return super().forward(_rotate(query, cosine, sine), _rotate(key, cosine, sine), value, attention_mask)

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
