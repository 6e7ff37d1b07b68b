"""DeepSeek-V3 (2412.19437): `DeepseekV3ForCausalLM` of transformers.

Latent attention, with YaRN or plain rotary positions; mixtures as in hf_sigmoid.py. Features that rotate together are
neighbours in its files as in Megatron's latent attention (both part evens from odds before they rotate), so rows stand
as they are.
"""

from typing import Any

from ...base.errors import UserError
from ...models.mla_config import MLAConfig, YarnConfig
from . import hf_sigmoid
from .formats import IN_TRAINING, Architecture
from .hf_config import Keys, architecture, common_model, rotary, written_common
from .hf_sigmoid import PLACES, read_mixture, refuse_mixture, refuse_shape, write_mixture

NAME, MODEL_TYPE, CLASS = "hf-deepseek-v3", "deepseek_v3", "DeepseekV3ForCausalLM"
MIXTURE = {
    "attention.q_down": "self_attn.q_a_proj.weight",
    "attention.q_norm": "self_attn.q_a_layernorm.weight",
    "attention.q_up": "self_attn.q_b_proj.weight",
    "attention.kv_down": "self_attn.kv_a_proj_with_mqa.weight",
    "attention.kv_norm": "self_attn.kv_a_layernorm.weight",
    "attention.kv_up": "self_attn.kv_b_proj.weight",
    **PLACES,
}
# Some are of DeepSeek's own code, which its published config.json files are written for.
WITHOUT_EFFECT = {
    **hf_sigmoid.WITHOUT_EFFECT,
    "auto_map": "where DeepSeek's own code lies, which is not run",
    "aux_loss_alpha": IN_TRAINING,
    "ep_size": "how experts were spread over ranks",
    "seq_aux": IN_TRAINING,
}
LATENT_EPS = 1e-6  # transformers' code and DeepSeek's: rms_norm_eps is not for the norms of the latents


def read(keys: Keys) -> Architecture:
    """Translate a configuration."""
    keys.only("attention_bias", False, default=False)
    keys.only("rope_interleave", True, default=True)
    keys.only("moe_layer_freq", 1, default=1)
    keys.only("scoring_func", "sigmoid", default="sigmoid")
    keys.only("topk_method", "noaux_tc", default="noaux_tc")
    mla = {
        "q_rank": keys.take("q_lora_rank"),
        "kv_rank": keys.integer("kv_lora_rank"),
        "nope_dim": keys.integer("qk_nope_head_dim"),
        "rope_dim": keys.integer("qk_rope_head_dim"),
        "value_dim": keys.integer("v_head_dim"),
        "norm_eps": LATENT_EPS,
    }
    # transformers derives both, writes them, and believes what it reads: head_dim decides how far features turn.
    keys.only("head_dim", mla["rope_dim"], None, default=None)
    keys.only("qk_head_dim", mla["nope_dim"] + mla["rope_dim"], None, default=None)
    model = {**common_model(keys), **rotary(keys, base=10_000, yarn=True), "mla": mla}
    model["ffn"] = keys.integer("intermediate_size")
    found = architecture(keys, model, read_mixture(keys, groups=8, groups_active=4, scale=2.5))
    refuse_shape(NAME, found)
    return found


def refuse(found: Architecture) -> None:
    """Refuse what DeepSeek-V3 cannot express."""
    refuse_mixture(NAME, found)
    mla = _latents(found)
    if mla.norm_eps != LATENT_EPS:
        raise UserError(
            f"model.mla.norm_eps ({mla.norm_eps:g}) cannot be expressed in {NAME}, which has {LATENT_EPS:g}"
        )
    yarn = found.model.yarn
    if yarn is not None and (yarn.mscale == 0 or yarn.mscale_all_dim == 0) and yarn.mscale != 1:
        raise UserError(
            f"model.yarn.mscale ({yarn.mscale:g}) with model.yarn.mscale_all_dim ({yarn.mscale_all_dim:g}) cannot be "
            f"expressed in {NAME}, which reads mscale only where neither is 0"
        )


def _latents(found: Architecture) -> MLAConfig:
    if found.model.mla is None:
        raise UserError(f"model.mla (none): {NAME} has latent attention; hf-glm4-moe has ordinary attention")
    return found.model.mla


def write(found: Architecture) -> dict[str, Any]:
    """The configuration in transformers' keys, and those of DeepSeek's own code that other readers ask for."""
    mla = _latents(found)
    content = {
        **written_common(found, MODEL_TYPE, CLASS),
        **write_mixture(NAME, found),
        "attention_bias": False,
        "kv_lora_rank": mla.kv_rank,
        "moe_layer_freq": 1,
        "q_lora_rank": mla.q_rank,
        "qk_nope_head_dim": mla.nope_dim,
        "qk_rope_head_dim": mla.rope_dim,
        "rope_interleave": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "v_head_dim": mla.value_dim,
    }
    return content if found.model.yarn is None else {**content, "rope_scaling": _written_yarn(found.model.yarn)}


def _written_yarn(yarn: YarnConfig) -> dict[str, Any]:
    return {
        "rope_type": "yarn",
        "type": "yarn",  # the older word, which DeepSeek's own code reads
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_seq,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
        "mscale": yarn.mscale,
        "mscale_all_dim": yarn.mscale_all_dim,
    }
