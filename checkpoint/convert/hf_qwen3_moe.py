"""Qwen3-MoE (2505.09388): `Qwen3MoeForCausalLM` of transformers. Free head size, norms of each head, dense layers."""

from typing import Any

from ...base.errors import UserError
from ...moe.config import MoEConfig
from . import hf_olmoe
from .formats import Architecture
from .hf_config import (
    NO_GROUPS,
    PLAIN_ATTENTION,
    PLAIN_MIXTURE,
    Keys,
    architecture,
    common_model,
    demand,
    demand_mixture,
    rotary,
    written_common,
)

NAME, MODEL_TYPE, CLASS = "hf-qwen3-moe", "qwen3_moe", "Qwen3MoeForCausalLM"
MIXTURE = hf_olmoe.MIXTURE
WITHOUT_EFFECT = {
    "max_window_layers": "use_sliding_window is false",
    "sliding_window": "use_sliding_window is false",
}


def read(keys: Keys) -> Architecture:
    """Translate a configuration."""
    keys.only("attention_bias", False, default=False)
    keys.only("use_sliding_window", False, default=False)
    model = {
        **common_model(keys),
        **rotary(keys, base=10_000),
        "qk_norm": "head",
        "ffn": keys.integer("intermediate_size"),
        "head_dim": keys.take("head_dim", None),
    }
    experts = keys.take("num_experts", None)
    moe = {
        "experts": keys.integer("num_local_experts") if experts is None else experts,
        "active": keys.integer("num_experts_per_tok"),
        "expert_width": keys.integer("moe_intermediate_size"),
        "score": "softmax_normalized" if keys.flag("norm_topk_prob", False) else "softmax",
        **_which_layers(keys, model["layers"]),
    }
    return architecture(keys, model, moe)


def _which_layers(keys: Keys, layers: int) -> dict[str, int]:
    """Our two numbers for the layers that are mixtures.

    Raises:
        UserError: no two numbers give these layers.
    """
    step, dense = keys.integer("decoder_sparse_step", 1), keys.take("mlp_only_layers", None) or []
    wanted = [layer not in dense and (layer + 1) % step == 0 for layer in range(layers)]
    for every in range(1, layers + 1):
        for first in range(layers):
            found = MoEConfig(experts=1, active=1, expert_width=8, first_dense=first, every=every)
            if [found.is_mixture(layer) for layer in range(layers)] == wanted and any(wanted):
                return {"first_dense": first, "every": every}
    raise UserError(
        f"{keys.origin}: mlp_only_layers ({dense}) with decoder_sparse_step ({step}) cannot be expressed: mixtures "
        "must be every n-th layer behind the first dense ones"
    )


def refuse(found: Architecture) -> None:
    """Refuse what Qwen3-MoE cannot express."""
    demand_mixture(NAME, found)
    demand(
        NAME,
        found,
        {
            **PLAIN_ATTENTION,
            **PLAIN_MIXTURE,
            **NO_GROUPS,
            "model.qk_norm": ("head",),
            "moe.score": ("softmax", "softmax_normalized"),
        },
    )


def write(found: Architecture) -> dict[str, Any]:
    """The configuration in transformers' keys."""
    moe = demand_mixture(NAME, found)
    return {
        **written_common(found, MODEL_TYPE, CLASS),
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "head_dim": found.model.head_dim,
        "mlp_only_layers": [layer for layer in range(found.model.layers) if not moe.is_mixture(layer)],
        "moe_intermediate_size": moe.width_of_expert(found.model.width),
        "norm_topk_prob": moe.score == "softmax_normalized",
        "num_experts": moe.experts,
        "num_experts_per_tok": moe.active,
        "output_router_logits": False,
        "router_aux_loss_coef": moe.aux_loss,
        "use_sliding_window": False,
    }
