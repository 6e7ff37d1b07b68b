"""OLMoE (2409.02060): `OlmoeForCausalLM` of transformers. Its norms of queries and keys span all heads."""

from typing import Any

from ...base.errors import UserError
from .formats import Architecture
from .hf_config import (
    NO_GROUPS,
    PLAIN_ATTENTION,
    PLAIN_MIXTURE,
    Keys,
    architecture,
    common_model,
    demand,
    demand_every_layer,
    demand_mixture,
    rotary,
    written_common,
)

NAME, MODEL_TYPE, CLASS = "hf-olmoe", "olmoe", "OlmoeForCausalLM"
MIXTURE = {
    "attention.q_norm": "self_attn.q_norm.weight",
    "attention.k_norm": "self_attn.k_norm.weight",
    "moe.router": "mlp.gate.weight",
    "moe.experts.*.gate": "mlp.experts.*.gate_proj.weight",
    "moe.experts.*.up": "mlp.experts.*.up_proj.weight",
    "moe.experts.*.down": "mlp.experts.*.down_proj.weight",
}
WITHOUT_EFFECT: dict[str, str] = {}


def read(keys: Keys) -> Architecture:
    """Translate a configuration."""
    keys.only("attention_bias", False, default=False)
    keys.only("clip_qkv", None, default=None)
    model = {**common_model(keys), **rotary(keys, base=10_000), "qk_norm": "full"}
    moe = {
        "experts": keys.integer("num_experts"),
        "active": keys.integer("num_experts_per_tok"),
        "expert_width": keys.integer("intermediate_size"),
        "score": "softmax_normalized" if keys.flag("norm_topk_prob", False) else "softmax",
    }
    return architecture(keys, model, moe)


def refuse(found: Architecture) -> None:
    """Refuse what OLMoE cannot express."""
    demand_every_layer(NAME, found)
    demand(
        NAME,
        found,
        {
            **PLAIN_ATTENTION,
            **PLAIN_MIXTURE,
            **NO_GROUPS,
            "model.qk_norm": ("full",),
            "moe.score": ("softmax", "softmax_normalized"),
        },
    )
    model = found.model
    if model.head_dim * model.heads != model.width:
        raise UserError(f"model.head_dim ({model.head_dim}) must be model.width / model.heads in {NAME}")


def write(found: Architecture) -> dict[str, Any]:
    """The configuration in transformers' keys."""
    moe = demand_mixture(NAME, found)
    return {
        **written_common(found, MODEL_TYPE, CLASS),
        "attention_bias": False,
        "clip_qkv": None,
        "intermediate_size": moe.width_of_expert(found.model.width),
        "norm_topk_prob": moe.score == "softmax_normalized",
        "num_experts": moe.experts,
        "num_experts_per_tok": moe.active,
        "output_router_logits": False,
        "router_aux_loss_coef": moe.aux_loss,
    }
