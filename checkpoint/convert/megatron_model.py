"""Megatron-core's own GPT with the weights of a distributed checkpoint: the judge of what was read or written.

`dist_checkpointing.load` unpickles whatever a checkpoint holds, so the model is filled box by box through our reader,
under the names and offsets that its own ``sharded_state_dict`` asks for.
"""

import re
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, merge
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factory_merges
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from torch import Tensor
from torch.nn import functional as F

from ...models.latent_attention import tell_whether_transformer_engine_is_there
from .formats import Architecture
from .megatron_arguments import arguments_of
from .megatron_files import DistCheckpoint

_NORM_NAMES = ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight")


def logits_of(checkpoint: DistCheckpoint, found: Architecture, tokens_BS: Tensor, dtype: torch.dtype) -> Tensor:
    """``[B, S, vocab]`` in fp32, from parameters rounded to ``dtype``."""
    model = build_model(found).eval()
    fill(model, checkpoint)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
        device = next(model.parameters()).device
        length = tokens_BS.shape[1]
        position_BS = torch.arange(length, device=device).expand_as(tokens_BS)
        hidden = torch.ones(1, 1, length, length, dtype=torch.bool, device=device).triu(1)
        logits_BSV: Tensor = model(tokens_BS.to(device), position_BS, hidden)
    return logits_BSV[..., : found.vocab].float().cpu()


def build_model(found: Architecture, **changes: Any) -> GPTModel:
    """Megatron-core's GPTModel from local specs, weights not yet set; needs its process groups.

    Args:
        changes: of the `TransformerConfig`, such as sizes of its layout.
    """
    # Without Transformer Engine 0.16 leaves this name undefined and still reads it.
    moe_utils.te_general_gemm = getattr(moe_utils, "te_general_gemm", None)
    tell_whether_transformer_engine_is_there()
    model_parallel_cuda_manual_seed(0)
    config = transformer_config(found, **changes)
    if found.moe is None:
        spec = get_gpt_layer_local_spec(
            qk_layernorm=config.qk_layernorm,
            normalization="RMSNorm",
            multi_latent_attention=config.multi_latent_attention,
        )
    else:
        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")
    if found.model.mla is not None:
        for layer in [spec] if found.moe is None else spec.layer_specs:
            layer.submodules.self_attention.submodules.core_attention = _LatentCore
    from megatron.core import parallel_state

    model = GPTModel(
        config,
        spec,
        vocab_size=found.model.padded_vocab(found.vocab),
        max_sequence_length=found.model.max_seq or 4096,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=found.model.tied,
        position_embedding_type="rope",
        rotary_percent=found.model.rotary_fraction,
        rotary_base=found.model.rope_base,
    )
    return model.cuda() if torch.cuda.is_available() else model


def transformer_config(found: Architecture, **changes: Any) -> TransformerConfig:
    """What Megatron-LM makes of our arguments, in fp32, without fusions."""
    arguments = arguments_of(found)
    kind = TransformerConfig if found.model.mla is None else MLATransformerConfig
    fields = {f for f in kind.__dataclass_fields__}
    keys = {key: value for key, value in arguments.items() if key in fields and key != "num_experts"}
    return kind(
        **{
            **keys,
            "layernorm_epsilon": found.model.norm_eps,
            "gated_linear_unit": True,
            "activation_func": F.silu,
            "num_moe_experts": arguments["num_experts"],
            "moe_aux_loss_coeff": arguments.get("moe_aux_loss_coeff", 0.0),
            "moe_token_dispatcher_type": "allgather",  # the other one wants CUDA streams
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "bias_activation_fusion": False,
            "bias_dropout_fusion": False,
            "masked_softmax_fusion": False,
            "gradient_accumulation_fusion": False,
            "use_cpu_initialization": True,
            "perform_initialization": False,
            "pipeline_dtype": torch.float32,
            **changes,
        }
    )


class _LatentCore(DotProductAttention):
    """Megatron's own, which its latent attention tells widths that only Transformer Engine's takes."""

    def __init__(self, *arguments: Any, k_channels: Any = None, v_channels: Any = None, **keywords: Any):
        super().__init__(*arguments, **keywords)


def fill(model: GPTModel, checkpoint: DistCheckpoint) -> None:
    """Set a model's parameters and persistent buffers from a checkpoint.

    Raises:
        RuntimeError: the checkpoint lacks one.
    """
    names = checkpoint.tensors
    metadata = {
        "non_homogeneous_layers": any(re.match(r"decoder\.layers\.\d+\.", name) for name in names),
        "singleton_local_shards": any(name.endswith("linear_fc1.weight_w") for name in names),
    }
    sharded, others, factories = load_preprocess(model.sharded_state_dict(metadata=metadata))
    merge(sharded, others)
    dict_list_map_inplace(lambda wanted: _read(wanted, checkpoint), sharded)
    state = apply_factory_merges(sharded, factories)
    missing = model.load_state_dict(
        {name: value for name, value in state.items() if isinstance(value, Tensor)}, strict=False
    ).missing_keys
    lost = [name for name in missing if not name.endswith("_extra_state")]
    if lost:
        raise RuntimeError(f"the checkpoint does not hold {', '.join(lost[:8])}")


def _read(wanted: Any, checkpoint: DistCheckpoint) -> Any:
    """The values of a sharded tensor, float32; of other objects nothing."""
    if not isinstance(wanted, ShardedTensor):
        return None
    name = wanted.key
    if name not in checkpoint.tensors:
        one, other = _NORM_NAMES
        name = name.replace(one, other) if one in name else name.replace(other, one)
    extent = [*(1 for _ in range(wanted.prepend_axis_num)), *wanted.local_shape]
    start = list(wanted.global_offset)
    values = torch.zeros(wanted.local_shape)
    if wanted.allow_shape_mismatch:  # as many rows of the vocabulary as there are
        extent[0] = max(min(extent[0], checkpoint.tensors[name].shape[0] - start[0]), 0)
    box = checkpoint.box(name, tuple(start), tuple(extent)).float()
    values.view(*(1 for _ in range(wanted.prepend_axis_num)), *wanted.local_shape)[: extent[0]] = box
    return values
