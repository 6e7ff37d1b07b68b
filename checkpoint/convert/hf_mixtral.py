"""Mixtral (2401.04088): `MixtralForCausalLM` of transformers. Every layer is a mixture, weights sum to 1."""

from typing import Any

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

NAME, MODEL_TYPE, CLASS = "hf-mixtral", "mixtral", "MixtralForCausalLM"
MIXTURE = {
    "moe.router": "block_sparse_moe.gate.weight",
    "moe.experts.*.gate": "block_sparse_moe.experts.*.w1.weight",
    "moe.experts.*.up": "block_sparse_moe.experts.*.w3.weight",
    "moe.experts.*.down": "block_sparse_moe.experts.*.w2.weight",
}
WITHOUT_EFFECT: dict[str, str] = {}


def read(keys: Keys) -> Architecture:
    """Translate a configuration."""
    keys.only("sliding_window", None, default=None)
    model = {**common_model(keys), **rotary(keys, base=1_000_000), "head_dim": keys.take("head_dim", None)}
    moe = {
        "experts": keys.integer("num_local_experts"),
        "active": keys.integer("num_experts_per_tok"),
        "expert_width": keys.integer("intermediate_size"),
        "score": "softmax_normalized",
    }
    return architecture(keys, model, moe)


def refuse(found: Architecture) -> None:
    """Refuse what Mixtral cannot express."""
    demand_every_layer(NAME, found)
    demand(
        NAME,
        found,
        {
            **PLAIN_ATTENTION,
            **PLAIN_MIXTURE,
            **NO_GROUPS,
            "model.qk_norm": ("none",),
            "moe.score": ("softmax_normalized",),
        },
    )


def write(found: Architecture) -> dict[str, Any]:
    """The configuration in transformers' keys."""
    moe = demand_mixture(NAME, found)
    return {
        **written_common(found, MODEL_TYPE, CLASS),
        "head_dim": found.model.head_dim,
        "intermediate_size": moe.width_of_expert(found.model.width),
        "num_experts_per_tok": moe.active,
        "num_local_experts": moe.experts,
        "output_router_logits": False,
        "router_aux_loss_coef": moe.aux_loss,
        "router_jitter_noise": 0.0,
        "sliding_window": None,
    }
