"""A GPT from Megatron-core's own parts: its model, its layer spec, with our norm, core attention and MoE layer."""

import logging
from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from torch import Tensor, nn
from torch.nn import functional as F

from ..moe.bind_deepspeed import DeepSpeedExperts
from ..moe.bind_megatron import MegatronMoE
from ..moe.config import MoEConfig
from ..parallel.groups import Groups
from .attention import CausalAttention, RotaryCausalAttention
from .config import ModelConfig
from .feed_forward import SwiGLU
from .latent_attention import LatentAttention
from .loss import token_losses
from .mla_config import MLAConfig
from .norms import FullRMSNorm, RMSNorm

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class MixtureLayer(MegatronMoE, DeepSpeedExperts):
    """Our MoE layer as Megatron's ``mlp`` and as DeepSpeed's MoE."""

    def __init__(self, config: Any, **keywords: Any):
        super().__init__(config, **keywords)
        self.mark_experts(self)


class GPT(GPTModel):
    """`GPTModel` that gives the padded part of the vocabulary no probability."""

    real_vocab: int

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Loss of each token, ``[B, S]``; logits ``[S, B, V]`` hold this tensor rank's part of the vocabulary."""
        group = self.pg_collection.tp if self.config.tensor_model_parallel_size > 1 else None
        labels_T = labels.transpose(0, 1).flatten()
        loss_T = token_losses(logits.view(-1, logits.shape[-1]), labels_T, self.real_vocab, group)
        return loss_T.view(logits.shape[:2]).transpose(0, 1)


class Stage(nn.ModuleList):
    """A rank's part of the model: one `GPT` for each of its chunks of layers, in the order of the model."""

    def mixtures(self) -> list[tuple[int, MixtureLayer]]:
        """(index of the layer in the model, mixture), in order."""
        chunks: list[Any] = list(self)
        layers = [layer for chunk in chunks for layer in chunk.decoder.layers]
        return [(layer.layer_number - 1, layer.mlp) for layer in layers if isinstance(layer.mlp, MixtureLayer)]


def build_stage(
    model: ModelConfig,
    moe: MoEConfig | None,
    *,
    vocab: int,
    seq: int,
    dtype: str,
    groups: Groups,
    recompute: str = "none",
    device: str | None = None,
) -> Stage:
    """This rank's part of the model, parameters not yet drawn (see models/initialise.py).

    Args:
        vocab: pieces of the tokenizer; the model's vocabulary is padded as the configuration says.
        seq: longest sequence.
        device: "meta" for shapes alone, however large the model; default: CUDA where it exists, else CPU.
    """
    # A spec's mlp that is none of Megatron's own classes makes it log a line for each layer.
    logging.getLogger("megatron.core.transformer.transformer_layer").setLevel(logging.ERROR)
    config = _megatron_config(model, moe, dtype, groups, recompute)
    model_parallel_cuda_manual_seed(0)  # the tracker's states must exist; nothing of ours draws from them
    stage = Stage()
    for chunk in range(groups.topology.virtual_stages):
        with torch.device(device or "cpu"):
            gpt = GPT(
                config,
                _layer_specs(model, moe, groups, chunk),
                vocab_size=model.padded_vocab(vocab),
                max_sequence_length=model.max_seq or seq,
                pre_process=groups.is_first(chunk),
                post_process=groups.is_last(chunk),
                share_embeddings_and_output_weights=model.tied,
                position_embedding_type="none",  # core attention applies rotary positions
                vp_stage=chunk if groups.topology.virtual_stages > 1 else None,
            )
        gpt.real_vocab = vocab
        stage.append(gpt)
    if groups.topology.tensor == 1:
        _use_plain_products(stage)
    for module in stage.modules():
        if isinstance(module, MixtureLayer):
            module.to(DTYPES[dtype])
    return stage.cuda() if device is None and torch.cuda.is_available() else stage


def _use_plain_products(stage: Stage) -> None:
    """Let Megatron's parallel linear layers be `F.linear` where nothing is cut.

    Their autograd functions overlap communication with products; without communication only their Python remains, a
    tenth of a small model's step.
    """
    for module in stage.modules():
        if isinstance(module, (ColumnParallelLinear, RowParallelLinear)):
            module.forward = partial(_plain_product, module)


def _plain_product(
    module: nn.Module, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
) -> tuple[Tensor, None]:
    own: Any = module.weight
    bias: Any = module.bias
    return F.linear(input_, own if weight is None else weight, bias), None


def _megatron_config(
    model: ModelConfig, moe: MoEConfig | None, dtype: str, groups: Groups, recompute: str
) -> TransformerConfig:
    topology = groups.topology
    kind = TransformerConfig if model.mla is None else MLATransformerConfig
    config = kind(
        **({} if model.mla is None else _latent_settings(model, model.mla)),
        num_layers=model.layers,
        hidden_size=model.width,
        num_attention_heads=model.heads,
        num_query_groups=model.kv_heads,
        kv_channels=model.head_dim,
        ffn_hidden_size=model.ffn,
        gated_linear_unit=True,
        activation_func=F.silu,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        add_bias_linear=False,
        add_qkv_bias=model.qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        use_cpu_initialization=True,
        perform_initialization=False,
        params_dtype=DTYPES[dtype],
        bf16=dtype == "bf16",
        pipeline_dtype=DTYPES[dtype],
        tensor_model_parallel_size=topology.tensor,
        sequence_parallel=topology.sequence,
        pipeline_model_parallel_size=topology.pipeline,
        virtual_pipeline_model_parallel_size=topology.virtual_stages if topology.virtual_stages > 1 else None,
        deallocate_pipeline_outputs=True,
        batch_p2p_comm=False,
        recompute_granularity="full" if recompute == "full" else None,
        recompute_method="uniform" if recompute == "full" else None,
        recompute_num_layers=1 if recompute == "full" else None,
    )
    # Set afterwards, so that it does one thing only: the schedule then divides auxiliary losses by the number of
    # micro-batches as it divides the loss.
    config.num_moe_experts = moe.experts if moe is not None else None
    return config


def _latent_settings(model: ModelConfig, mla: MLAConfig) -> dict[str, Any]:
    """What Megatron's latent attention takes besides, its rotary positions among it."""
    settings = {
        "q_lora_rank": mla.q_rank,
        "kv_lora_rank": mla.kv_rank,
        "qk_head_dim": mla.nope_dim,
        "qk_pos_emb_head_dim": mla.rope_dim,
        "v_head_dim": mla.value_dim,
        "rotary_base": model.rope_base,
        "rope_type": "rope",
        "rotary_scaling_factor": 1.0,  # read without YaRN too: at 1 scores are scaled by 1 / sqrt(width) alone
    }
    if model.yarn is not None:
        settings |= {
            "rope_type": "yarn",
            "rotary_scaling_factor": model.yarn.factor,
            "original_max_position_embeddings": model.yarn.original_seq,
            "beta_fast": model.yarn.beta_fast,
            "beta_slow": model.yarn.beta_slow,
            "mscale": model.yarn.mscale,
            "mscale_all_dim": model.yarn.mscale_all_dim,
        }
    return settings


def _layer_specs(model: ModelConfig, moe: MoEConfig | None, groups: Groups, chunk: int) -> TransformerBlockSubmodules:
    """One spec for each layer of a chunk."""
    specs = []
    for layer in groups.topology.layers(groups.rank, chunk, model.layers):
        spec = _dense_spec(model, groups)
        if moe is not None and moe.is_mixture(layer):
            spec.submodules.mlp = ModuleSpec(
                module=MixtureLayer,
                params={
                    "moe": moe,
                    "exchange": groups.exchange,
                    "exchange_chunks": groups.exchange_chunks,
                    "sequence_group": groups.sequence,
                },
            )
        specs.append(spec)
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=RMSNorm)


def _dense_spec(model: ModelConfig, groups: Groups) -> ModuleSpec:
    spec = get_gpt_layer_local_spec(normalization="RMSNorm", multi_latent_attention=model.mla is not None)
    spec.submodules.input_layernorm = RMSNorm
    spec.submodules.pre_mlp_layernorm = RMSNorm
    spec.submodules.mlp.module = SwiGLU
    if model.mla is not None:
        _use_latents(spec.submodules.self_attention, model.mla)
    else:
        _use_heads(spec.submodules.self_attention.submodules, model, groups)
    return spec


def _use_heads(attention: Any, model: ModelConfig, groups: Groups) -> None:
    rotation = {"base": model.rope_base, "rotary": model.rotary_dim}
    attention.core_attention = ModuleSpec(module=RotaryCausalAttention, params=rotation)
    attention.q_layernorm = attention.k_layernorm = None
    if model.qk_norm == "head":
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    elif model.qk_norm == "full":
        for key, heads in (("q_layernorm", model.heads), ("k_layernorm", model.kv_heads)):
            norm = ModuleSpec(module=FullRMSNorm, params={"heads": heads, "group": groups.heads})
            setattr(attention, key, norm)


def _use_latents(attention: ModuleSpec, mla: MLAConfig) -> None:
    attention.module = LatentAttention
    attention.params["norm_eps"] = mla.norm_eps
    attention.submodules.core_attention = CausalAttention
    attention.submodules.q_layernorm = attention.submodules.kv_layernorm = RMSNorm
