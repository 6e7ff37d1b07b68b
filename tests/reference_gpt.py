"""The whole model written out in plain torch over logical tensors (models/names.py): the judge of every layout.

Nothing here is fast, fused or sharded, and nothing is imported from the model's own code. Experts are a loop. It
computes in the dtype of the tensors it is given; float64 makes it exact enough to judge any float32 result.

``at`` says where the randomness of a batch comes from: its seed, its step and the global number of its first sample.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
At = tuple[int, int, int]


@dataclass(frozen=True)
class Visits:
    """Visits of each expert, ``[E]``, and how many of them were dropped."""

    load_E: Tensor
    dropped: int


Seen = dict[int, Visits]  # by layer
MARGIN = 2e-6  # of router probabilities


def reference_losses(
    tensors: Tensors,
    model: Any,
    moe: Any | None,
    vocab: int,
    tokens_BS: Tensor,
    labels_BS: Tensor,
    at: At = (0, 0, 0),
    seen: Seen | None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Losses of a batch.

    Args:
        tensors: logical tensors by name; gradients flow to those that ask for them. Biases and loads of mixtures are
            used where they are given.
        model: a ModelConfig.
        moe: a MoEConfig, or None.
        vocab: pieces of the tokenizer; the padded rest of the vocabulary gets no probability.
        seen: is filled with what each mixture layer saw.

    Returns:
        Token losses ``[B, S]``; for each mixture layer its load-balance loss (mean over the B sequences) and the sum
        of its z-loss over tokens, both without coefficients.
    """
    logits_BSV, aux, z_sum = reference_logits(tensors, model, moe, tokens_BS, at, seen)
    real_BSV = logits_BSV[..., :vocab]
    loss_BS = torch.logsumexp(real_BSV, dim=-1) - real_BSV.gather(-1, labels_BS.unsqueeze(-1)).squeeze(-1)
    return loss_BS, aux, z_sum


def reference_logits(
    tensors: Tensors, model: Any, moe: Any | None, tokens_BS: Tensor, at: At = (0, 0, 0), seen: Seen | None = None
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Logits ``[B, S, V padded]`` and the router losses of each mixture layer."""
    normed = partial(rms_norm, epsilon=model.norm_eps)
    x_BSD = tensors["embedding"][tokens_BS]
    aux, z_sum = [], []
    for layer in range(model.layers):
        parts = part_of(tensors, f"layers.{layer}.")
        x_BSD = x_BSD + attention(normed(x_BSD, parts["attention_norm"]), part_of(parts, "attention."), model)
        y_BSD = normed(x_BSD, parts["ffn_norm"])
        if "moe.experts.0.gate" in parts:
            y_BSD, layer_aux, layer_z, visits = mixture(y_BSD, part_of(parts, "moe."), moe, tokens_BS, layer, at)
            if seen is not None:
                seen[layer] = visits
            aux.append(layer_aux)
            z_sum.append(layer_z)
        else:
            y_BSD = swiglu(y_BSD, part_of(parts, "ffn."))
        x_BSD = x_BSD + y_BSD
    head_VD = tensors["embedding"] if model.tied else tensors["head"]
    return normed(x_BSD, tensors["final_norm"]) @ head_VD.T, aux, z_sum


def part_of(tensors: Tensors, prefix: str) -> Tensors:
    """Tensors whose name starts with ``prefix``, by the rest of the name."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def rms_norm(x: Tensor, gain: Tensor, epsilon: float) -> Tensor:
    """Over as many last dimensions as the gain has."""
    dimensions = tuple(range(-gain.dim(), 0))
    return x / torch.sqrt(x.square().mean(dim=dimensions, keepdim=True) + epsilon) * gain


def swiglu(x: Tensor, weights: Tensors) -> Tensor:
    gate, up = x @ weights["gate"].T, x @ weights["up"].T
    return (gate * torch.sigmoid(gate) * up) @ weights["down"].T


def rotate(x_BSHd: Tensor, base: float, features: int) -> Tensor:
    """Rotary positions of the first d features: feature i turns with feature i + d/2 (not with its neighbour)."""
    x_BSHd, rest_BSHd = x_BSHd[..., :features], x_BSHd[..., features:]
    positions, half = x_BSHd.shape[1], x_BSHd.shape[-1] // 2
    frequency = base ** (-torch.arange(half, dtype=x_BSHd.dtype) / half)
    angle_SH = (torch.arange(positions, dtype=x_BSHd.dtype).unsqueeze(-1) * frequency).unsqueeze(1)
    first, second = x_BSHd[..., :half], x_BSHd[..., half:]
    cosine, sine = torch.cos(angle_SH), torch.sin(angle_SH)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine, rest_BSHd], dim=-1)


def attention(x_BSD: Tensor, weights: Tensors, model: Any) -> Tensor:
    """Causal attention; each key/value head serves heads / kv_heads consecutive query heads."""
    if model.mla is not None:
        return latent_attention(x_BSD, weights, model)
    batch, length = x_BSD.shape[:2]

    def heads(name: str, count: int) -> Tensor:
        bias = weights[f"{name}_bias"] if model.qkv_bias else 0
        return (x_BSD @ weights[name].T + bias).view(batch, length, count, model.head_dim)

    q, k, v = heads("q", model.heads), heads("k", model.kv_heads), heads("v", model.kv_heads)
    if model.qk_norm != "none":
        q, k = (rms_norm(t, weights[name], model.norm_eps) for t, name in ((q, "q_norm"), (k, "k_norm")))
    features = int(model.head_dim * model.rotary_fraction)
    q, k = rotate(q, model.rope_base, features), rotate(k, model.rope_base, features)
    k, v = (t.repeat_interleave(model.heads // model.kv_heads, dim=2) for t in (k, v))
    return attend(q, k, v, 1 / math.sqrt(model.head_dim)) @ weights["o"].T


def attend(q_BSHd: Tensor, k_BSHd: Tensor, v_BSHd: Tensor, scale: float) -> Tensor:
    """Each token's mean of the values up to its own, ``[B, S, H d]``."""
    length = q_BSHd.shape[1]
    scores_BHQK = torch.einsum("bqhd,bkhd->bhqk", q_BSHd, k_BSHd) * scale
    later_QK = torch.ones(length, length, dtype=torch.bool).triu(diagonal=1)
    weights_BHQK = torch.softmax(scores_BHQK.masked_fill(later_QK, float("-inf")), dim=-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights_BHQK, v_BSHd).flatten(2)


def latent_attention(x_BSD: Tensor, weights: Tensors, model: Any) -> Tensor:
    """DeepSeek-V2 (2405.04434), equations 9 to 19: c are latents, and the key's rotating part is one for all heads."""
    mla, heads = model.mla, model.heads
    if mla.q_rank is None:
        q_BSHd = (x_BSD @ weights["q"].T).unflatten(-1, (heads, -1))
    else:
        c_q = rms_norm(x_BSD @ weights["q_down"].T, weights["q_norm"], mla.norm_eps)
        q_BSHd = (c_q @ weights["q_up"].T).unflatten(-1, (heads, -1))
    down = x_BSD @ weights["kv_down"].T
    c_kv = rms_norm(down[..., : mla.kv_rank], weights["kv_norm"], mla.norm_eps)
    up_BSHd = (c_kv @ weights["kv_up"].T).unflatten(-1, (heads, -1))
    turning_BS1r = down[..., mla.kv_rank :].unsqueeze(2)
    q_BSHd = torch.cat([q_BSHd[..., : mla.nope_dim], rotate_pairs(q_BSHd[..., mla.nope_dim :], model)], dim=-1)
    turned_BSHr = rotate_pairs(turning_BS1r, model).expand(-1, -1, heads, -1)
    k_BSHd = torch.cat([up_BSHd[..., : mla.nope_dim], turned_BSHr], dim=-1)
    scale = 1 / math.sqrt(mla.nope_dim + mla.rope_dim)
    if model.yarn is not None:
        scale *= yarn_factor(model.yarn, model.yarn.mscale_all_dim) ** 2
    return attend(q_BSHd, k_BSHd, up_BSHd[..., mla.nope_dim :], scale) @ weights["o"].T


def yarn_factor(yarn: Any, mscale: float) -> float:
    return 0.1 * mscale * math.log(yarn.factor) + 1


def rotate_pairs(x_BSHr: Tensor, model: Any) -> Tensor:
    """Rotary positions of latent attention: feature 2i turns with its neighbour 2i + 1.

    YaRN (2309.00071, section 3.2): pair i makes L b^(-2i/r) / 2 pi turns over the first length L; pairs between
    ``beta_fast`` and ``beta_slow`` turns are mixed linearly in i, from the last whole i before to the first behind.
    """
    positions, half = x_BSHr.shape[1], x_BSHr.shape[-1] // 2
    pair = torch.arange(half, dtype=x_BSHr.dtype)
    frequency = model.rope_base ** (-pair / half)
    size = 1.0
    if (yarn := model.yarn) is not None:

        def pair_of(turns: float) -> float:
            return half * math.log(yarn.original_seq / (2 * math.pi * turns)) / math.log(model.rope_base)

        first = max(math.floor(pair_of(yarn.beta_fast)), 0)
        last = min(math.ceil(pair_of(yarn.beta_slow)), 2 * half - 1)
        slowed = ((pair - first) / (last - first if last != first else 0.001)).clamp(0, 1)
        frequency = frequency * (1 - slowed) + frequency / yarn.factor * slowed
        size = yarn_factor(yarn, yarn.mscale) / yarn_factor(yarn, yarn.mscale_all_dim)
    angle_S1h = (torch.arange(positions, dtype=x_BSHr.dtype).unsqueeze(-1) * frequency).unsqueeze(1)
    turn = torch.polar(torch.full_like(angle_S1h, size), angle_S1h)
    return torch.view_as_real(torch.view_as_complex(x_BSHr.unflatten(-1, (half, 2)).contiguous()) * turn).flatten(-2)


def extend(key: int, number: int) -> int:
    """SplitMix64: the output that follows ``number`` others from state ``key``."""
    x = (key + (number + 1) * 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def uniforms(shape: tuple[int, int, int], layer: int, at: At) -> Tensor:
    """Numbers in (0, 1) for each sample and position of a batch, float64."""
    seed, step, first = at
    batch_key = extend(extend(extend(0, seed), step), layer)
    values = [
        ((extend(extend(extend(batch_key, first + b), s), i) >> 41) + 0.5) / 2**23
        for b in range(shape[0])
        for s in range(shape[1])
        for i in range(shape[2])
    ]
    return torch.tensor(values, dtype=torch.float64).view(shape)


def best(values: Tensor, count: int) -> Tensor:
    """Whether each value is among the ``count`` largest of its row.

    Inputs must not leave the choice to rounding: float32 computes these values to about 1e-7.
    """
    if count >= values.shape[-1]:
        return torch.ones_like(values, dtype=torch.bool)
    ordered = values.sort(dim=-1, descending=True).values
    margin = (ordered[..., count - 1] - ordered[..., count]).min().item()
    assert margin > MARGIN, f"two choices are {margin:.1e} apart: take other inputs, this is a draw"
    return values >= ordered[..., count - 1 : count]


def in_best_groups(scores_BSE: Tensor, moe: Any) -> Tensor:
    """Whether each expert is of one of the token's best groups."""
    split = scores_BSE.unflatten(-1, (moe.groups, -1))
    two = min(2, split.shape[-1]) if moe.score.startswith("sigmoid") else 1
    group_BSG = split.sort(dim=-1, descending=True).values[..., :two].sum(dim=-1)
    return best(group_BSG, moe.groups_active).repeat_interleave(moe.experts // moe.groups, dim=-1)


def hashed(tokens_BS: Tensor, layer: int, moe: Any) -> Tensor:
    """Experts by the tokens' ids, one permutation for each run of E ids."""
    chosen_BSE = torch.zeros(*tokens_BS.shape, moe.experts, dtype=torch.bool)
    for b, sequence in enumerate(tokens_BS.tolist()):
        for s, token in enumerate(sequence):
            key = extend(extend(extend(0, 0), layer), token // moe.experts)
            signed = [(extend(key, e) + 2**63) % 2**64 for e in range(moe.experts)]
            order = sorted(range(moe.experts), key=signed.__getitem__)
            for k in range(moe.active):
                chosen_BSE[b, s, order[(token + k) % moe.experts]] = True
    return chosen_BSE


def forced(shape: tuple[int, int], layer: int, moe: Any, at: At) -> Tensor:
    """Experts by perturbed chances."""
    gumbel_BSE = -torch.log(-torch.log(uniforms((*shape, moe.experts), layer, at)))
    return best(gumbel_BSE - moe.skew * torch.log(1 + torch.arange(moe.experts, dtype=torch.float64)), moe.active)


def chosen_by_scores(logits_BSE: Tensor, scores_BSE: Tensor, moe: Any) -> Tensor:
    """Whether a token visits an expert."""
    if moe.router == "expert_choice":
        assert moe.grouping == "sequence"
        quota = [(logits_BSE.shape[1] * moe.active + expert) // moe.experts for expert in range(moe.experts)]
        return torch.stack([best(scores_BSE[..., e], quota[e]) for e in range(moe.experts)], dim=-1)
    if moe.router == "sinkhorn":
        assert moe.grouping == "sequence"
        plan_BSE = logits_BSE
        for _ in range(4):
            plan_BSE = plan_BSE - torch.logsumexp(plan_BSE, dim=2, keepdim=True)
            plan_BSE = plan_BSE - torch.logsumexp(plan_BSE, dim=1, keepdim=True)
        return best(plan_BSE, moe.active)
    wanted_BSE = scores_BSE
    if moe.groups > 1:
        wanted_BSE = wanted_BSE.masked_fill(~in_best_groups(scores_BSE, moe), -torch.inf)
    return best(wanted_BSE, moe.active)


def route(
    x_BSD: Tensor, weights: Tensors, moe: Any, tokens_BS: Tensor, layer: int, at: At
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a token visits, with which weights, the router's probabilities (each ``[B, S, E]``), log-partitions."""
    if moe.router in ("hash", "forced"):
        by_id = moe.router == "hash"
        chosen_BSE = hashed(tokens_BS, layer, moe) if by_id else forced(x_BSD.shape[:2], layer, moe, at)
        share_BSE = chosen_BSE.to(x_BSD.dtype)
        return chosen_BSE, share_BSE * moe.weight_scale / moe.active, 0 * share_BSE, torch.zeros(())
    if moe.jitter:
        x_BSD = x_BSD * (1 + moe.jitter * (2 * uniforms(tuple(x_BSD.shape), layer, at) - 1))
    logits_BSE = x_BSD @ weights["router"].T
    scores_BSE = torch.sigmoid(logits_BSE) if moe.score.startswith("sigmoid") else torch.softmax(logits_BSE, dim=-1)
    wanted_BSE = scores_BSE + weights["bias"] if "bias" in weights else scores_BSE
    chosen_BSE = chosen_by_scores(logits_BSE.detach(), wanted_BSE.detach(), moe)
    weight_BSE = scores_BSE * chosen_BSE
    if moe.score.endswith("normalized"):
        weight_BSE = weight_BSE / weight_BSE.sum(dim=-1, keepdim=True)
    probs_BSE = scores_BSE / scores_BSE.sum(dim=-1, keepdim=True)
    return chosen_BSE, weight_BSE * moe.weight_scale, probs_BSE, torch.logsumexp(logits_BSE, dim=-1)


def mixture(
    x_BSD: Tensor, weights: Tensors, moe: Any, tokens_BS: Tensor, layer: int, at: At
) -> tuple[Tensor, Tensor, Tensor, Visits]:
    """Output, load-balance loss (mean over sequences), z-loss (sum over tokens) and visits of a mixture."""
    chosen_BSE, weight_BSE, probs_BSE, logsumexp_BS = route(x_BSD, weights, moe, tokens_BS, layer, at)
    served_BSE = chosen_BSE if moe.capacity is None else within_capacity(chosen_BSE, weight_BSE.detach(), moe)
    y_BSD = torch.zeros_like(x_BSD)
    for expert in range(moe.experts):
        chosen_BS = served_BSE[..., expert]
        if chosen_BS.any():
            out_RD = swiglu(x_BSD[chosen_BS], part_of(weights, f"experts.{expert}."))
            share_R1 = weight_BSE[..., expert][chosen_BS].unsqueeze(-1)
            y_BSD = y_BSD.index_put((chosen_BS,), out_RD * share_R1, accumulate=True)
    if moe.shared:
        y_BSD = y_BSD + swiglu(x_BSD, part_of(weights, "shared."))
    visits = Visits(chosen_BSE.sum(dim=(0, 1)), int(chosen_BSE.sum() - served_BSE.sum()))
    visited_BE = chosen_BSE.to(x_BSD.dtype).sum(dim=1) / (moe.active * x_BSD.shape[1])
    if moe.balance == "global":
        load_E = weights["load"] if weights["load"].sum() > 0 else torch.ones_like(weights["load"])
        visited_BE = load_E / load_E.sum()
    aux = (moe.experts * (visited_BE * probs_BSE.mean(dim=1)).sum(dim=-1)).mean()
    return y_BSD, aux, logsumexp_BS.square().sum(), visits


def within_capacity(chosen_BSE: Tensor, weight_BSE: Tensor, moe: Any) -> Tensor:
    """Whether a visit is among the first that its expert serves in its sequence."""
    assert moe.capacity_scope == "sequence"
    capacity = math.ceil(moe.capacity * moe.active * chosen_BSE.shape[1] / moe.experts)
    if moe.drop == "position":
        return chosen_BSE & (chosen_BSE.cumsum(dim=1) <= capacity)
    nobody_S1 = -torch.arange(1, chosen_BSE.shape[1] + 1).unsqueeze(-1)  # behind every visit, and no draw
    line_BES = torch.where(chosen_BSE, weight_BSE, nobody_S1).transpose(1, 2)
    return chosen_BSE & best(line_BES, capacity).transpose(1, 2)
