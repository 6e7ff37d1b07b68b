"""Llama (dense): `LlamaForCausalLM` of transformers."""

from typing import Any

from ...base.errors import UserError
from .formats import Architecture
from .hf_config import PLAIN_ATTENTION, Keys, architecture, common_model, demand, rotary, written_common

NAME, MODEL_TYPE, CLASS = "hf-llama", "llama", "LlamaForCausalLM"
MIXTURE: dict[str, str] = {}
WITHOUT_EFFECT: dict[str, str] = {}


def read(keys: Keys) -> Architecture:
    """Translate a configuration."""
    keys.only("attention_bias", False, default=False)
    keys.only("mlp_bias", False, default=False)
    model = {
        **common_model(keys),
        **rotary(keys, base=10_000),
        "ffn": keys.integer("intermediate_size"),
        "head_dim": keys.take("head_dim", None),
    }
    return architecture(keys, model, None)


def refuse(found: Architecture) -> None:
    """Refuse what Llama cannot express."""
    if found.moe is not None:
        raise UserError(f"moe.experts ({found.moe.experts}): the model is a mixture, and {NAME} is dense")
    demand(NAME, found, {**PLAIN_ATTENTION, "model.qk_norm": ("none",)})
    if found.model.width % found.model.heads:
        raise UserError(
            f"model.heads ({found.model.heads}) must divide model.width ({found.model.width}) in {NAME}, whatever "
            "model.head_dim is"
        )


def write(found: Architecture) -> dict[str, Any]:
    """The configuration in transformers' keys."""
    return {
        **written_common(found, MODEL_TYPE, CLASS),
        "attention_bias": False,
        "head_dim": found.model.head_dim,
        "mlp_bias": False,
    }
