"""Models that Megatron-core saves in the tests of conversion, and the layouts that save them."""

from dataclasses import dataclass, field
from typing import Any

from moescale.checkpoint.convert.formats import Architecture
from moescale.models.config import ModelConfig
from moescale.models.mla_config import MLAConfig, YarnConfig
from moescale.moe import MoEConfig

VOCAB = 120  # padded to 128
SEQ = 12
DENSE = Architecture(ModelConfig(layers=2, width=32, heads=4, kv_heads=2, tied=False, ffn=40), None, VOCAB)
TIED = Architecture(ModelConfig(layers=4, width=32, heads=2, head_dim=24, ffn=48, qk_norm="head"), None, VOCAB)
MIXTURE = Architecture(
    ModelConfig(layers=2, width=32, heads=4, kv_heads=2, tied=False, rope_base=500, norm_eps=1e-6),
    MoEConfig(
        experts=6, active=3, expert_width=24, shared=2, score="sigmoid_normalized", weight_scale=2.5, bias_rate=0.01
    ),
    VOCAB,
)
MIXED = Architecture(
    ModelConfig(layers=4, width=32, heads=2, ffn=40, rotary_fraction=0.5, qkv_bias=True),
    MoEConfig(experts=4, active=2, expert_width=16, first_dense=1, every=2, score="softmax_normalized"),
    VOCAB,
)
LATENT = Architecture(
    ModelConfig(
        layers=2,
        width=32,
        heads=2,
        ffn=40,
        norm_eps=1e-6,
        mla=MLAConfig(kv_rank=12, nope_dim=6, rope_dim=4, value_dim=10),
    ),
    None,
    VOCAB,
)
DEEPSEEK = Architecture(
    ModelConfig(
        layers=3,
        width=32,
        heads=4,
        tied=False,
        norm_eps=1e-6,
        mla=MLAConfig(q_rank=10, kv_rank=8, nope_dim=6, rope_dim=6, value_dim=8),
        yarn=YarnConfig(factor=4, original_seq=6, beta_fast=2, beta_slow=0.1, mscale=0.8, mscale_all_dim=1.3),
    ),
    MoEConfig(experts=4, active=2, expert_width=16, first_dense=1, shared=1, score="sigmoid_normalized", bias_rate=0.1),
    VOCAB,
)
MODELS = {
    "dense": DENSE,
    "tied": TIED,
    "mixture": MIXTURE,
    "mixed": MIXED,
    "latent": LATENT,
    "deepseek": DEEPSEEK,
}


@dataclass(frozen=True)
class Case:
    """A model, the layout of the two ranks that save it, and what they are told about the names to save it under."""

    found: Architecture
    layout: dict[str, int]
    metadata: dict[str, Any] = field(default_factory=dict)


CASES = {
    "dense, tensor": Case(DENSE, {"tensor_model_parallel_size": 2}),
    "dense, pipeline": Case(TIED, {"pipeline_model_parallel_size": 2}),
    "mixture, expert": Case(MIXTURE, {"expert_model_parallel_size": 2}),
    "mixture, tensor": Case(MIXTURE, {"tensor_model_parallel_size": 2}),
    "mixed, pipeline": Case(MIXED, {"pipeline_model_parallel_size": 2}),
    "latent, tensor": Case(LATENT, {"tensor_model_parallel_size": 2}),
    "deepseek, tensor": Case(DEEPSEEK, {"tensor_model_parallel_size": 2}),
    "mixture, experts apart": Case(
        MIXTURE, {"expert_model_parallel_size": 2}, {"singleton_local_shards": True, "non_homogeneous_layers": True}
    ),
}
