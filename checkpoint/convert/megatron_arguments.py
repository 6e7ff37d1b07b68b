"""Megatron-LM's arguments and our configuration, each from the other.

A checkpoint of Megatron-LM holds the arguments of its run. Those that decide what the model computes are translated,
or must have the one value that we can express; those of `TransformerConfig` that nobody here knows must have their
default, and whatever does not is refused by name. One of Megatron-core alone holds no arguments at all.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from ...base.errors import UserError
from ...models.config import ModelConfig
from ...models.counts import mixture_layers
from ...moe.config import MoEConfig
from .formats import Architecture, Setting
from .megatron_latents import TRANSLATED as _LATENT_TRANSLATED
from .megatron_latents import check_latents, read_latents, write_latents

# Arguments with one value that we can express (the first is also what an absent one means).
_REQUIRED: Mapping[str, tuple[Any, ...]] = {
    "normalization": ("RMSNorm",),
    "swiglu": (True,),
    "gated_linear_unit": (True,),
    "position_embedding_type": ("rope",),
    "add_bias_linear": (False,),
    "rotary_interleaved": (False,),
    "use_rope_scaling": (False,),
    "rotary_seq_len_interpolation_factor": (None, 1),
    "mrope_section": (None,),
    "no_rope_freq": (None,),
    "apply_layernorm_1p": (False,),
    "layernorm_zero_centered_gamma": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "experimental_attention_variant": (None,),
    "linear_attention_freq": (None,),
    "attention_output_gate": (False,),
    "qk_l2_norm": (False,),
    "window_size": (None,),
    "softmax_type": ("vanilla",),
    "softmax_scale": (None,),
    "squared_relu": (False,),
    "openai_gelu": (False,),
    "quick_geglu": (False,),
    "glu_linear_offset": (0.0,),
    "activation_func_clamp_value": (None,),
    "mtp_num_layers": (None, 0),
    "is_hybrid_model": (False,),
    "heterogeneous_layers_config_path": (None,),
    "heterogeneous_block_specs": (False, None),
    "moe_expert_capacity_factor": (None,),
    "moe_shared_expert_gate": (False,),
    "moe_latent_size": (None,),
    "moe_router_force_load_balancing": (False,),
    "moe_router_topk_limited_devices": (None,),
    "moe_apply_probs_on_input": (False,),
}
# Arguments without which Megatron computes something that we cannot: their absence is no consent.
_NEEDED = ("normalization", "swiglu", "add_bias_linear")
_TRANSLATED = {
    "num_layers", "hidden_size", "num_attention_heads", "group_query_attention", "num_query_groups", "kv_channels",
    "ffn_hidden_size", "untie_embeddings_and_output_weights", "qk_layernorm", "norm_epsilon", "layernorm_epsilon",
    "rotary_base", "rotary_percent", "add_qkv_bias", "max_position_embeddings", "vocab_size", "padded_vocab_size",
    "num_experts", "num_moe_experts",
    "moe_router_topk", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size", "moe_layer_freq",
    "moe_router_score_function", "moe_router_pre_softmax", "moe_router_topk_scaling_factor", "moe_router_num_groups",
    "moe_router_group_topk", "moe_router_enable_expert_bias", "moe_router_bias_update_rate",
    "moe_router_load_balancing_type", "moe_aux_loss_coeff", "moe_z_loss_coeff", "moe_input_jitter_eps",
}  # fmt: skip
# Fields of TransformerConfig that say how something is computed, on which ranks, or how it is trained; not what.
_NEUTRAL = re.compile(
    r"recompute|fus|cuda_graph|fp8|fp4|tp_comm|offload|_parallel|parallel_|pipeline|overlap|dropout|init|dtype|bf16|fp16|"
    r"backend|rng|deterministic|moe_(grouped|use_legacy|token|permute|router_(dtype|padding)|layer|per_layer|enable_deepep|"
    r"flex|deepep|hybridep|extended|pad)|mlp_chunks|batch_p2p|variable_seq|microbatch|num_microbatches|context|"
    r"attention_softmax_in_fp32|apply_query_key_layer_scaling|fp32_residual|persist_layer_norm|memory_efficient|"
    r"calculate_per_token_loss|config_logger|transformer_impl|inference|flash_decode|timers|_func$|autocast|wgrad|"
    r"account_for|mtp_loss|test_mode|use_te|symmetric_ar|cache_mla|disable_|clone_scatter|cp_comm|cross_entropy|use_ring|"
    r"max_seqlen|ep_overlap|distribute_saved|qk_clip|log_max|quant_recipe|batch_invariant|sequence_parallel|"
    r"barrier|tp_only|kitchen|routing_replay|hetereogenous_dist|"
    r"mamba_|linear_(conv|key|value|num)|dsa_|mtp_|window_attn"  # act only with what is refused above
)
_BALANCE = {"aux_loss": "micro_batch", "seq_aux_loss": "sequence", "none": "none"}
# Sections' keys that do not change what a model computes from tokens.
_UNSEEN_MODEL = {"shape", "max_seq", "init_std", "vocab_multiple"}
_UNSEEN_MOE = {
    "granularity",
    "expert_width",
    "jitter",
    "balance",
    "aux_loss",
    "z_loss",
    "bias_rate",
    "first_dense",
    "every",
}


def architecture_of(arguments: Mapping[str, Any], origin: str) -> tuple[Architecture, list[Setting]]:
    """The model that a run of Megatron-LM with ``arguments`` trains.

    Raises:
        UserError: names the argument that we cannot express, its value, and what we could.
    """
    _check_required(arguments, origin)
    _check_unknown(arguments, origin)
    try:
        model = _model(arguments, origin)
        moe = _moe(arguments, model) if arguments.get("num_experts") else None
    except _InexpressibleError as error:
        raise UserError(f"{origin}: {error}") from None
    except (ValidationError, TypeError, KeyError, ZeroDivisionError) as error:
        raise UserError(f"{origin}: its arguments make no model of ours: {error}") from None
    vocab = arguments.get("vocab_size") or arguments.get("padded_vocab_size")
    if type(vocab) is not int:
        raise UserError(f"{origin}: vocab_size ({vocab!r}) and padded_vocab_size say nothing; give --config")
    return Architecture(model, moe, vocab), _settings(arguments)


def _check_required(arguments: Mapping[str, Any], origin: str) -> None:
    for key in _NEEDED:
        if key not in arguments:
            raise UserError(f"{origin}: the arguments lack {key}; give --config without them, or the whole of them")
    for key, legal in _REQUIRED.items():
        value = arguments.get(key, legal[0])
        if value not in legal:
            raise UserError(f"{origin}: {key} ({value!r}) cannot be expressed; {legal[0]!r} can")


def _check_unknown(arguments: Mapping[str, Any], origin: str) -> None:
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    latent = bool(arguments.get("multi_latent_attention"))
    for field in dataclasses.fields(MLATransformerConfig if latent else TransformerConfig):
        known = field.name in _TRANSLATED | _LATENT_TRANSLATED or field.name in _REQUIRED or _NEUTRAL.search(field.name)
        if known or field.name not in arguments:
            continue
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if arguments[field.name] != default:
            raise UserError(
                f"{origin}: {field.name} ({arguments[field.name]!r}) is not known here and may change what the model "
                f"computes; only its default ({default!r}) is taken"
            )


class _InexpressibleError(Exception):
    """A combination of arguments that our configuration has no words for."""


def _model(given: Mapping[str, Any], origin: str) -> ModelConfig:
    heads, width, vocab = given["num_attention_heads"], given["hidden_size"], given.get("padded_vocab_size")
    grouped = given.get("group_query_attention") or "group_query_attention" not in given
    keys: dict[str, Any] = {
        "layers": given["num_layers"],
        "width": width,
        "heads": heads,
        "kv_heads": (given.get("num_query_groups") if grouped else None) or heads,
        "head_dim": given.get("kv_channels") or width // heads,
        "ffn": given.get("ffn_hidden_size") or 4 * width,
        "tied": not given.get("untie_embeddings_and_output_weights", False),
        "qk_norm": "head" if given.get("qk_layernorm") else "none",
        "norm_eps": given.get("norm_epsilon", given.get("layernorm_epsilon", 1e-5)),
        "rope_base": given.get("rotary_base", 10_000),
        "rotary_fraction": given.get("rotary_percent", 1.0),
        "qkv_bias": bool(given.get("add_qkv_bias", False)),
        "max_seq": given.get("max_position_embeddings"),
    }
    keys |= read_latents(given, keys["norm_eps"], origin)
    if vocab and vocab != ModelConfig(**keys).padded_vocab(given.get("vocab_size") or vocab):
        keys["vocab_multiple"] = vocab
    return ModelConfig(**keys)


def _moe(given: Mapping[str, Any], model: ModelConfig) -> MoEConfig:
    hidden = given.get("moe_ffn_hidden_size") or model.ffn
    shared = given.get("moe_shared_expert_intermediate_size") or 0
    if shared % hidden:
        raise _InexpressibleError(
            f"moe_shared_expert_intermediate_size ({shared}) must be a multiple of moe_ffn_hidden_size ({hidden})"
        )
    first_dense, every = _pattern(given.get("moe_layer_freq", 1), model.layers)
    active, function = given.get("moe_router_topk", 2), given.get("moe_router_score_function", "softmax")
    groups, groups_active = given.get("moe_router_num_groups") or 1, given.get("moe_router_group_topk") or 1
    if groups_active == 1 and not given.get("moe_router_group_topk"):
        groups = 1  # Megatron looks at groups only where it is told how many to visit
    bias = given.get("moe_router_enable_expert_bias", False)
    balance = given.get("moe_router_load_balancing_type", "aux_loss")
    if balance == "sinkhorn":
        raise _InexpressibleError("moe_router_load_balancing_type (sinkhorn) cannot be expressed; aux_loss can")
    keys: dict[str, Any] = {
        "experts": given["num_experts"],
        "active": active,
        "expert_width": hidden,
        "shared": shared // hidden,
        "first_dense": first_dense,
        "every": every,
        "score": _score(function, given.get("moe_router_pre_softmax", False), active),
        "weight_scale": given.get("moe_router_topk_scaling_factor") or 1.0,
        "groups": groups,
        "groups_active": groups_active,
        "jitter": given.get("moe_input_jitter_eps") or 0.0,
        "z_loss": given.get("moe_z_loss_coeff") or 0.0,
        "bias_rate": given.get("moe_router_bias_update_rate", 1e-3) if bias else 0.0,
    }
    if balance in _BALANCE:
        keys |= {"balance": _BALANCE[balance], "aux_loss": given.get("moe_aux_loss_coeff") or 0.0}
    moe = MoEConfig(**keys)
    _check_groups(moe)
    return moe


def _pattern(frequency: Any, layers: int) -> tuple[int, int]:
    """(first_dense, every) with the mixtures that Megatron's ``moe_layer_freq`` means."""
    if isinstance(frequency, str):
        raise _InexpressibleError(f"moe_layer_freq ({frequency!r}): a number or a list of 0 and 1 is expected")
    wanted = list(frequency) if isinstance(frequency, list) else [int(n % frequency == 0) for n in range(layers)]
    for first_dense in range(layers):
        for every in range(1, layers - first_dense + 1):
            probe = MoEConfig(experts=1, active=1, expert_width=8, first_dense=first_dense, every=every)
            if [int(probe.is_mixture(n)) for n in range(layers)] == wanted:
                return first_dense, every
    raise _InexpressibleError(
        f"moe_layer_freq ({frequency!r}) cannot be expressed: of the layers behind moe.first_dense, the last of each "
        "moe.every is a mixture"
    )


def _score(function: str, before: bool, active: int) -> str:
    if function == "sigmoid":
        return "sigmoid_normalized" if active > 1 else "sigmoid"
    if function == "softmax":
        return "softmax" if before else "softmax_normalized"
    raise _InexpressibleError(f"moe_router_score_function ({function!r}) cannot be expressed; softmax and sigmoid can")


def _check_groups(moe: MoEConfig) -> None:
    """Megatron ranks groups by their best K / groups_active experts, we by the best one (softmax) or two (sigmoid)."""
    best = min(2, moe.experts // moe.groups) if moe.score.startswith("sigmoid") else 1
    if moe.groups > 1 and (moe.active % moe.groups_active or moe.active // moe.groups_active != best):
        raise _InexpressibleError(
            f"moe.groups_active ({moe.groups_active}) with moe.active ({moe.active}) and moe.score {moe.score}: "
            f"Megatron ranks groups by their best {moe.active // moe.groups_active} experts and we by {best}"
        )


def _settings(arguments: Mapping[str, Any]) -> list[Setting]:
    """What became of each argument that has to do with the model, and of the rest."""
    translated = _TRANSLATED | (_LATENT_TRANSLATED if arguments.get("multi_latent_attention") else set())
    told = [Setting(key, arguments[key], "translated") for key in sorted(translated & arguments.keys())]
    told += [
        Setting(key, arguments[key], "without effect", "what every model of ours has")
        for key in _REQUIRED
        if key in arguments
    ]
    rest = len(arguments) - len(told)
    return [
        *told,
        Setting("other arguments", rest, "without effect", "of the run, or at a default of TransformerConfig"),
    ]


def check_expressible(architecture: Architecture) -> None:
    """Refuse what Megatron-core's own modules cannot compute.

    Raises:
        UserError: names the key, its value, and what could be expressed.
    """
    model, moe = architecture.model, architecture.moe
    check_latents(model)
    if model.qk_norm == "full":
        raise UserError("model.qk_norm (full): Megatron-core norms each head alone; none and head can be converted")
    if moe is None:
        return
    if moe.router != "topk":
        raise UserError(f"moe.router ({moe.router}): Megatron-core has no such router; topk can be converted")
    if moe.capacity is not None:
        raise UserError(f"moe.capacity ({moe.capacity}): Megatron-core drops other visits; null can be converted")
    wrong = {"softmax_normalized": moe.active == 1, "sigmoid": moe.active > 1, "sigmoid_normalized": moe.active == 1}
    if wrong.get(moe.score, False):
        raise UserError(
            f"moe.score ({moe.score}) with moe.active ({moe.active}): Megatron-core weighs these differently"
        )
    if moe.bias_rate and not moe.score.startswith("sigmoid"):
        raise UserError(f"moe.bias_rate ({moe.bias_rate}): Megatron-core has a bias with sigmoid scores only")
    try:
        _check_groups(moe)
    except _InexpressibleError as error:
        raise UserError(str(error)) from None


def arguments_of(architecture: Architecture) -> dict[str, Any]:
    """Megatron-LM's arguments for a model that `check_expressible` let pass."""
    model, moe = architecture.model, architecture.moe
    padded = model.padded_vocab(architecture.vocab)
    arguments: dict[str, Any] = {key: legal[0] for key, legal in _REQUIRED.items() if not key.startswith("moe_")} | {
        "num_layers": model.layers,
        "hidden_size": model.width,
        "num_attention_heads": model.heads,
        "group_query_attention": model.kv_heads != model.heads,
        "num_query_groups": model.kv_heads,
        "kv_channels": model.head_dim,
        "ffn_hidden_size": model.ffn,
        "untie_embeddings_and_output_weights": not model.tied,
        "qk_layernorm": model.qk_norm == "head",
        "norm_epsilon": model.norm_eps,
        "rotary_base": model.rope_base,
        "rotary_percent": model.rotary_fraction,
        "add_qkv_bias": model.qkv_bias,
        "vocab_size": architecture.vocab,
        "padded_vocab_size": padded,
        "make_vocab_size_divisible_by": model.vocab_multiple,
        "add_position_embedding": False,
        "num_experts": None,
    }
    arguments |= write_latents(model)
    if model.max_seq is not None:
        arguments["max_position_embeddings"] = model.max_seq
    return arguments if moe is None else arguments | _mixture_arguments(model, moe)


def _mixture_arguments(model: ModelConfig, moe: MoEConfig) -> dict[str, Any]:
    hidden = moe.width_of_expert(model.width)
    mixtures = [int(moe.is_mixture(n)) for n in range(model.layers)]
    of_balance = {ours: theirs for theirs, ours in _BALANCE.items()}
    return {key: legal[0] for key, legal in _REQUIRED.items() if key.startswith("moe_")} | {
        "num_experts": moe.experts,
        "moe_router_topk": moe.active,
        "moe_ffn_hidden_size": hidden,
        "moe_shared_expert_intermediate_size": moe.shared * hidden or None,
        "moe_layer_freq": 1 if all(mixtures) else mixtures,
        "moe_router_score_function": "sigmoid" if moe.score.startswith("sigmoid") else "softmax",
        "moe_router_pre_softmax": moe.score == "softmax",
        "moe_router_topk_scaling_factor": moe.weight_scale if moe.weight_scale != 1 else None,
        "moe_router_num_groups": moe.groups if moe.groups > 1 else None,
        "moe_router_group_topk": moe.groups_active if moe.groups > 1 else None,
        "moe_router_enable_expert_bias": bool(moe.bias_rate),
        "moe_router_bias_update_rate": moe.bias_rate or 1e-3,
        "moe_router_load_balancing_type": of_balance.get(moe.balance, "none"),
        "moe_aux_loss_coeff": moe.aux_loss if moe.balance in of_balance else 0.0,
        "moe_z_loss_coeff": moe.z_loss or None,
        "moe_input_jitter_eps": moe.jitter or None,
    }


def check_agree(found: Architecture, given: Architecture, origin: str) -> None:
    """Refuse a configuration that means another model than a checkpoint's own arguments do.

    Raises:
        UserError: names the first key in which they differ.
    """
    pairs: list[tuple[str, Any, Any]] = [
        (f"model.{key}", getattr(given.model, key), getattr(found.model, key))
        for key in ModelConfig.model_fields
        if key not in _UNSEEN_MODEL
    ]
    pairs.append(("moe", given.moe is not None, found.moe is not None))
    if given.moe is not None and found.moe is not None:
        width = given.model.width
        keys = [key for key in MoEConfig.model_fields if key not in _UNSEEN_MOE]
        pairs += [(f"moe.{key}", getattr(given.moe, key), getattr(found.moe, key)) for key in keys]
        pairs.append(("moe.expert_width", given.moe.width_of_expert(width), found.moe.width_of_expert(width)))
        pairs.append(("mixture layers", mixture_layers(given.model, given.moe), mixture_layers(found.model, found.moe)))
        pairs.append(("moe.bias_rate above 0", given.moe.bias_rate > 0, found.moe.bias_rate > 0))
    for key, ours, theirs in pairs:
        if ours != theirs:
            raise UserError(f"{origin}: its arguments say {key} {theirs!r}, --config says {ours!r}")
