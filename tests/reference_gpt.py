"""The whole model written out in plain torch over logical tensors (models/names.py): the judge of every layout.

Nothing here is fast, fused or sharded, and nothing is imported from the model's own code. Experts are a loop. It
computes in the dtype of the tensors it is given; float64 makes it exact enough to judge any float32 result.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Tensors = dict[str, Tensor]
MARGIN = 2e-6  # of router probabilities
EPSILON = 1e-5


def reference_losses(
    tensors: Tensors, model: Any, moe: Any | None, vocab: int, tokens_BS: Tensor, labels_BS: Tensor
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Losses of a batch.

    Args:
        tensors: logical tensors by name; gradients flow to those that ask for them.
        model: a ModelConfig.
        moe: a MoEConfig, or None.
        vocab: pieces of the tokenizer; the padded rest of the vocabulary gets no probability.

    Returns:
        Token losses ``[B, S]``; for each mixture layer its load-balance loss (mean over the B sequences) and the sum
        of its z-loss over tokens, both without coefficients.
    """
    logits_BSV, aux, z_sum = reference_logits(tensors, model, moe, tokens_BS)
    real_BSV = logits_BSV[..., :vocab]
    loss_BS = torch.logsumexp(real_BSV, dim=-1) - real_BSV.gather(-1, labels_BS.unsqueeze(-1)).squeeze(-1)
    return loss_BS, aux, z_sum


def reference_logits(
    tensors: Tensors, model: Any, moe: Any | None, tokens_BS: Tensor
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Logits ``[B, S, V padded]`` and the router losses of each mixture layer."""
    x_BSD = tensors["embedding"][tokens_BS]
    aux, z_sum = [], []
    for layer in range(model.layers):
        parts = part_of(tensors, f"layers.{layer}.")
        x_BSD = x_BSD + attention(rms_norm(x_BSD, parts["attention_norm"]), part_of(parts, "attention."), model)
        y_BSD = rms_norm(x_BSD, parts["ffn_norm"])
        if "moe.router" in parts:
            y_BSD, layer_aux, layer_z = mixture(y_BSD, part_of(parts, "moe."), moe)
            aux.append(layer_aux)
            z_sum.append(layer_z)
        else:
            y_BSD = swiglu(y_BSD, part_of(parts, "ffn."))
        x_BSD = x_BSD + y_BSD
    head_VD = tensors["embedding"] if model.tied else tensors["head"]
    return rms_norm(x_BSD, tensors["final_norm"]) @ head_VD.T, aux, z_sum


def part_of(tensors: Tensors, prefix: str) -> Tensors:
    """Tensors whose name starts with ``prefix``, by the rest of the name."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def rms_norm(x: Tensor, gain: Tensor) -> Tensor:
    """Over as many last dimensions as the gain has."""
    dimensions = tuple(range(-gain.dim(), 0))
    return x / torch.sqrt(x.square().mean(dim=dimensions, keepdim=True) + EPSILON) * gain


def swiglu(x: Tensor, weights: Tensors) -> Tensor:
    gate, up = x @ weights["gate"].T, x @ weights["up"].T
    return (gate * torch.sigmoid(gate) * up) @ weights["down"].T


def rotate(x_BSHd: Tensor, base: float) -> Tensor:
    """Rotary positions: feature i turns with feature i + d/2 (not with its neighbour)."""
    positions, half = x_BSHd.shape[1], x_BSHd.shape[-1] // 2
    frequency = base ** (-torch.arange(half, dtype=x_BSHd.dtype) / half)
    angle_SH = (torch.arange(positions, dtype=x_BSHd.dtype).unsqueeze(-1) * frequency).unsqueeze(1)
    first, second = x_BSHd[..., :half], x_BSHd[..., half:]
    cosine, sine = torch.cos(angle_SH), torch.sin(angle_SH)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)


def attention(x_BSD: Tensor, weights: Tensors, model: Any) -> Tensor:
    """Causal attention; each key/value head serves heads / kv_heads consecutive query heads."""
    batch, length = x_BSD.shape[:2]

    def heads(name: str, count: int) -> Tensor:
        return (x_BSD @ weights[name].T).view(batch, length, count, model.head_dim)

    q, k, v = heads("q", model.heads), heads("k", model.kv_heads), heads("v", model.kv_heads)
    if model.qk_norm != "none":
        q, k = rms_norm(q, weights["q_norm"]), rms_norm(k, weights["k_norm"])
    q, k = rotate(q, model.rope_base), rotate(k, model.rope_base)
    k, v = (t.repeat_interleave(model.heads // model.kv_heads, dim=2) for t in (k, v))
    scores_BHQK = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(model.head_dim)
    later_QK = torch.ones(length, length, dtype=torch.bool).triu(diagonal=1)
    weights_BHQK = torch.softmax(scores_BHQK.masked_fill(later_QK, float("-inf")), dim=-1)
    mixed_BSHd = torch.einsum("bhqk,bkhd->bqhd", weights_BHQK, v)
    return mixed_BSHd.reshape(batch, length, -1) @ weights["o"].T


def check_margin(probs_BSE: Tensor, active: int) -> None:
    """Inputs must not leave the choice of experts to rounding: float32 computes these probabilities to about 1e-7."""
    if active < probs_BSE.shape[-1]:
        ordered_BSE = probs_BSE.sort(dim=-1, descending=True).values
        margin = (ordered_BSE[..., active - 1] - ordered_BSE[..., active]).min().item()
        assert margin > MARGIN, f"two experts are {margin:.1e} apart: choose other inputs, this is a draw"


def mixture(x_BSD: Tensor, weights: Tensors, moe: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Output of a mixture, its load-balance loss (mean over sequences) and its z-loss (sum over tokens)."""
    logits_BSE = x_BSD @ weights["router"].T
    probs_BSE = torch.softmax(logits_BSE, dim=-1)
    weight_BSK, index_BSK = torch.topk(probs_BSE, moe.active, dim=-1)
    check_margin(probs_BSE, moe.active)
    if moe.score == "softmax_normalized":
        weight_BSK = weight_BSK / weight_BSK.sum(dim=-1, keepdim=True)
    y_BSD = torch.zeros_like(x_BSD)
    for expert in range(moe.experts):
        share_BS = (weight_BSK * (index_BSK == expert)).sum(dim=-1)
        chosen_BS = (index_BSK == expert).any(dim=-1)
        if chosen_BS.any():
            out_RD = swiglu(x_BSD[chosen_BS], part_of(weights, f"experts.{expert}."))
            y_BSD = y_BSD.index_put((chosen_BS,), out_RD * share_BS[chosen_BS].unsqueeze(-1), accumulate=True)
    if moe.shared:
        y_BSD = y_BSD + swiglu(x_BSD, part_of(weights, "shared."))
    visits_BE = F.one_hot(index_BSK, moe.experts).sum(dim=(1, 2)).to(x_BSD.dtype)
    visited_BE = visits_BE / (moe.active * x_BSD.shape[1])
    aux = (moe.experts * (visited_BE * probs_BSE.mean(dim=1)).sum(dim=-1)).mean()
    return y_BSD, aux, torch.logsumexp(logits_BSE, dim=-1).square().sum()
