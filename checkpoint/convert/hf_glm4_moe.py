"""GLM-4.5 (2508.06471): `Glm4MoeForCausalLM` of transformers.

Sigmoid scores with a selection bias, groups of experts, shared experts, dense layers first, rotation of a part of each
head, biases of queries, keys and values.
"""

from typing import Any

from ...base.errors import UserError
from .formats import Architecture
from .hf_config import (
    PLAIN_MIXTURE,
    Keys,
    architecture,
    common_model,
    demand,
    demand_mixture,
    rotary,
    written_common,
)

NAME, MODEL_TYPE, CLASS = "hf-glm4-moe", "glm4_moe", "Glm4MoeForCausalLM"
MIXTURE = {
    "attention.q_norm": "self_attn.q_norm.weight",
    "attention.k_norm": "self_attn.k_norm.weight",
    "attention.q_bias": "self_attn.q_proj.bias",
    "attention.k_bias": "self_attn.k_proj.bias",
    "attention.v_bias": "self_attn.v_proj.bias",
    "moe.router": "mlp.gate.weight",
    "moe.bias": "mlp.gate.e_score_correction_bias",
    "moe.experts.*.gate": "mlp.experts.*.gate_proj.weight",
    "moe.experts.*.up": "mlp.experts.*.up_proj.weight",
    "moe.experts.*.down": "mlp.experts.*.down_proj.weight",
    "moe.shared.gate": "mlp.shared_experts.gate_proj.weight",
    "moe.shared.up": "mlp.shared_experts.up_proj.weight",
    "moe.shared.down": "mlp.shared_experts.down_proj.weight",
}
_AHEAD = "layers that predict further tokens come behind the model's own and do not change its logits"
WITHOUT_EFFECT = {"num_nextn_predict_layers": _AHEAD, "num_mtp_layers": _AHEAD}
BIAS_RATE = 0.001  # GLM-4.5, section 2.3; a rate above 0 is what gives our mixtures a bias


def read(keys: Keys) -> Architecture:
    """Translate a configuration."""
    normalized = keys.flag("norm_topk_prob", True)
    model = {
        **common_model(keys),
        **rotary(keys, base=10_000, fraction=0.5, partial=True),
        "qk_norm": "head" if keys.flag("use_qk_norm", False) else "none",
        "qkv_bias": keys.flag("attention_bias", False),
        "ffn": keys.integer("intermediate_size"),
        "head_dim": keys.take("head_dim", None),
    }
    moe = {
        "experts": keys.integer("n_routed_experts"),
        "active": keys.integer("num_experts_per_tok"),
        "expert_width": keys.integer("moe_intermediate_size"),
        "shared": keys.integer("n_shared_experts"),
        "first_dense": keys.integer("first_k_dense_replace"),
        "score": "sigmoid_normalized" if normalized else "sigmoid",
        "weight_scale": keys.take("routed_scaling_factor", 1.0),
        "groups": keys.integer("n_group", 1),
        "groups_active": keys.integer("topk_group", 1),
        "bias_rate": BIAS_RATE,
    }
    found = architecture(keys, model, moe)
    _refuse_shape(found)
    return found


def refuse(found: Architecture) -> None:
    """Refuse what GLM-4.5 cannot express."""
    demand_mixture(NAME, found)
    demand(
        NAME,
        found,
        {
            **PLAIN_MIXTURE,
            "model.qk_norm": ("none", "head"),
            "moe.every": (1,),
            "moe.score": ("sigmoid", "sigmoid_normalized"),
        },
    )
    _refuse_shape(found)


def _refuse_shape(found: Architecture) -> None:
    moe = demand_mixture(NAME, found)
    if not moe.shared:
        raise UserError(f"moe.shared (0): {NAME} always has shared experts")
    if moe.experts < 2 * moe.groups:
        raise UserError(
            f"moe.groups ({moe.groups}) of moe.experts ({moe.experts}): {NAME} ranks groups by their best two experts, "
            "so each needs two"
        )
    if moe.first_dense >= found.model.layers:
        raise UserError(f"moe.first_dense ({moe.first_dense}) leaves no mixture among {found.model.layers} layers")


def write(found: Architecture) -> dict[str, Any]:
    """The configuration in transformers' keys."""
    model, moe = found.model, demand_mixture(NAME, found)
    return {
        **written_common(found, MODEL_TYPE, CLASS),
        "attention_bias": model.qkv_bias,
        "first_k_dense_replace": moe.first_dense,
        "head_dim": model.head_dim,
        "moe_intermediate_size": moe.width_of_expert(model.width),
        "n_group": moe.groups,
        "n_routed_experts": moe.experts,
        "n_shared_experts": moe.shared,
        "norm_topk_prob": moe.score == "sigmoid_normalized",
        "num_experts_per_tok": moe.active,
        "num_nextn_predict_layers": 0,
        "partial_rotary_factor": model.rotary_fraction,
        "routed_scaling_factor": moe.weight_scale,
        "topk_group": moe.groups_active,
        "use_qk_norm": model.qk_norm == "head",
    }
