"""GLM-4.5 (2508.06471): `Glm4MoeForCausalLM` of transformers.

Rotation of a part of each head, norms of each head, biases of queries, keys and values; mixtures as in hf_sigmoid.py.
"""

from typing import Any

from . import hf_sigmoid
from .formats import Architecture
from .hf_config import NO_LATENTS, Keys, architecture, common_model, demand, rotary, written_common
from .hf_sigmoid import PLACES, read_mixture, refuse_mixture, refuse_shape, write_mixture

NAME, MODEL_TYPE, CLASS = "hf-glm4-moe", "glm4_moe", "Glm4MoeForCausalLM"
MIXTURE = {
    "attention.q_norm": "self_attn.q_norm.weight",
    "attention.k_norm": "self_attn.k_norm.weight",
    "attention.q_bias": "self_attn.q_proj.bias",
    "attention.k_bias": "self_attn.k_proj.bias",
    "attention.v_bias": "self_attn.v_proj.bias",
    **PLACES,
}
WITHOUT_EFFECT = hf_sigmoid.WITHOUT_EFFECT


def read(keys: Keys) -> Architecture:
    """Translate a configuration."""
    model = {
        **common_model(keys),
        **rotary(keys, base=10_000, fraction=0.5, partial=True),
        "qk_norm": "head" if keys.flag("use_qk_norm", False) else "none",
        "qkv_bias": keys.flag("attention_bias", False),
        "ffn": keys.integer("intermediate_size"),
        "head_dim": keys.take("head_dim", None),
    }
    found = architecture(keys, model, read_mixture(keys, groups=1, groups_active=1, scale=1.0))
    refuse_shape(NAME, found)
    return found


def refuse(found: Architecture) -> None:
    """Refuse what GLM-4.5 cannot express."""
    refuse_mixture(NAME, found)
    demand(NAME, found, {**NO_LATENTS, "model.qk_norm": ("none", "head")})


def write(found: Architecture) -> dict[str, Any]:
    """The configuration in transformers' keys."""
    return {
        **written_common(found, MODEL_TYPE, CLASS),
        **write_mixture(NAME, found),
        "attention_bias": found.model.qkv_bias,
        "head_dim": found.model.head_dim,
        "partial_rotary_factor": found.model.rotary_fraction,
        "use_qk_norm": found.model.qk_norm == "head",
    }
