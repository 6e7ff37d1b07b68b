"""Megatron-LM's arguments of multi-head latent attention and our sections ``model.mla`` and ``model.yarn``."""

from collections.abc import Mapping
from typing import Any

from ...base.errors import UserError
from ...models.config import ModelConfig

_NEEDED = ("qk_layernorm", "q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")
# Ours, and what Megatron-core's `MLATransformerConfig` takes where a run's arguments say nothing.
_YARN: Mapping[str, tuple[str, float]] = {
    "rotary_scaling_factor": ("factor", 40),
    "original_max_position_embeddings": ("original_seq", 4096),
    "beta_fast": ("beta_fast", 32),
    "beta_slow": ("beta_slow", 1),
    "mscale": ("mscale", 1.0),
    "mscale_all_dim": ("mscale_all_dim", 0.0),
}
TRANSLATED = {"multi_latent_attention", "rope_type", *_NEEDED, *_YARN}


def read_latents(given: Mapping[str, Any], norm_eps: float, origin: str) -> dict[str, Any]:
    """Keys of the ``model`` section, those of ordinary attention emptied; none without latent attention.

    Raises:
        UserError: names the argument that is missing or cannot be expressed.
    """
    if not given.get("multi_latent_attention"):
        return {}
    for key in _NEEDED:
        if key not in given:
            raise UserError(f"{origin}: the arguments lack {key}, which multi_latent_attention needs")
    if not given["qk_layernorm"]:
        raise UserError(f"{origin}: qk_layernorm (False) with multi_latent_attention cannot be expressed; True can")
    keys: dict[str, Any] = {
        "kv_heads": None,
        "head_dim": None,
        "qk_norm": "none",
        "mla": {
            "q_rank": given["q_lora_rank"],
            "kv_rank": given["kv_lora_rank"],
            "nope_dim": given["qk_head_dim"],
            "rope_dim": given["qk_pos_emb_head_dim"],
            "value_dim": given["v_head_dim"],
            "norm_eps": norm_eps,
        },
    }
    yarn = {ours: given.get(theirs, default) for theirs, (ours, default) in _YARN.items()}
    kind = given.get("rope_type") or "yarn"
    if kind == "yarn":
        return {**keys, "yarn": yarn, "rotary_fraction": 1.0}  # its rotary_percent is for the other kind
    if kind != "rope":
        raise UserError(f"{origin}: rope_type ({kind!r}) cannot be expressed; 'rope' and 'yarn' can")
    if yarn["factor"] > 1 and yarn["mscale_all_dim"]:
        raise UserError(
            f"{origin}: mscale_all_dim ({yarn['mscale_all_dim']}) with rope_type ('rope') scales scores alone, which "
            "cannot be expressed; 0 can"
        )
    return keys


def check_latents(model: ModelConfig) -> None:
    """Refuse latent attention that Megatron-core cannot compute.

    Raises:
        UserError: names the key and its value.
    """
    if model.mla is not None and model.mla.norm_eps != model.norm_eps:
        raise UserError(
            f"model.mla.norm_eps ({model.mla.norm_eps:g}): Megatron-core has one epsilon for all norms, here "
            f"model.norm_eps ({model.norm_eps:g})"
        )


def write_latents(model: ModelConfig) -> dict[str, Any]:
    """Megatron-LM's arguments."""
    mla, yarn = model.mla, model.yarn
    if mla is None:
        return {"multi_latent_attention": False}
    arguments = {
        "multi_latent_attention": True,
        "qk_layernorm": True,
        "kv_channels": mla.value_dim,  # which local specs take for the width of a head's output
        "q_lora_rank": mla.q_rank,
        "kv_lora_rank": mla.kv_rank,
        "qk_head_dim": mla.nope_dim,
        "qk_pos_emb_head_dim": mla.rope_dim,
        "v_head_dim": mla.value_dim,
    }
    if yarn is None:  # the factor is read without YaRN too: at 1 it changes nothing
        return {**arguments, "rope_type": "rope", "rotary_scaling_factor": 1.0, "mscale_all_dim": 0.0}
    stretched = {theirs: getattr(yarn, ours) for theirs, (ours, _) in _YARN.items()}
    return {**arguments, "rope_type": "yarn", **stretched}
