"""What GLM-4.5 and DeepSeek-V3 share in transformers: sigmoid scores with a selection bias, groups of experts, shared
experts, dense layers first, layers that predict further tokens behind the model's own.
"""

from typing import Any

from ...base.errors import UserError
from .formats import Architecture
from .hf_config import PLAIN_MIXTURE, Keys, demand, demand_mixture

PLACES = {
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
# GLM-4.5, section 2.3; DeepSeek-V3, section 4.2. A rate above 0 is what gives our mixtures a bias.
BIAS_RATE = 0.001


def read_mixture(keys: Keys, *, groups: int, groups_active: int, scale: float) -> dict[str, Any]:
    """The ``moe`` section.

    Args:
        groups, groups_active, scale: what transformers takes where nothing is said.
    """
    normalized = keys.flag("norm_topk_prob", True)
    return {
        "experts": keys.integer("n_routed_experts"),
        "active": keys.integer("num_experts_per_tok"),
        "expert_width": keys.integer("moe_intermediate_size"),
        "shared": keys.integer("n_shared_experts"),
        "first_dense": keys.integer("first_k_dense_replace"),
        "score": "sigmoid_normalized" if normalized else "sigmoid",
        "weight_scale": keys.take("routed_scaling_factor", scale),
        "groups": keys.integer("n_group", groups),
        "groups_active": keys.integer("topk_group", groups_active),
        "bias_rate": BIAS_RATE,
    }


def refuse_mixture(name: str, found: Architecture) -> None:
    """Refuse a mixture that cannot be expressed.

    Raises:
        UserError: names the key and its value.
    """
    demand_mixture(name, found)
    demand(name, found, {**PLAIN_MIXTURE, "moe.every": (1,), "moe.score": ("sigmoid", "sigmoid_normalized")})
    refuse_shape(name, found)


def refuse_shape(name: str, found: Architecture) -> None:
    """Refuse numbers of experts and layers that transformers' code cannot take.

    Raises:
        UserError: names the key and its value.
    """
    moe = demand_mixture(name, found)
    if not moe.shared:
        raise UserError(f"moe.shared (0): {name} always has shared experts")
    if moe.experts < 2 * moe.groups:
        raise UserError(
            f"moe.groups ({moe.groups}) of moe.experts ({moe.experts}): {name} ranks groups by their best two experts, "
            "so each needs two"
        )
    if moe.first_dense >= found.model.layers:
        raise UserError(f"moe.first_dense ({moe.first_dense}) leaves no mixture among {found.model.layers} layers")


def write_mixture(name: str, found: Architecture) -> dict[str, Any]:
    """Its keys in transformers' configuration."""
    moe = demand_mixture(name, found)
    return {
        "first_k_dense_replace": moe.first_dense,
        "moe_intermediate_size": moe.width_of_expert(found.model.width),
        "n_group": moe.groups,
        "n_routed_experts": moe.experts,
        "n_shared_experts": moe.shared,
        "norm_topk_prob": moe.score == "sigmoid_normalized",
        "num_experts_per_tok": moe.active,
        "num_nextn_predict_layers": 0,
        "routed_scaling_factor": moe.weight_scale,
        "topk_group": moe.groups_active,
    }
