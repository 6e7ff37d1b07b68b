"""Models built and saved by transformers, and conversions of them in this process's world of one rank."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

COMMON: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "eos_token_id": 7,
}
# Odd on purpose: experts that are no power of two, fewer keys than queries, free head sizes, dense layers in between.
FOREIGN: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("hf-llama", "LlamaConfig", {"intermediate_size": 48, "rms_norm_eps": 1e-6}),
    "llama, tied, other positions": (
        "hf-llama",
        "LlamaConfig",
        {
            "intermediate_size": 40,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_theta": 500.5},
            "head_dim": 12,
        },
    ),
    "mixtral": (
        "hf-mixtral",
        "MixtralConfig",
        {"intermediate_size": 24, "num_local_experts": 6, "num_experts_per_tok": 2, "rms_norm_eps": 1e-3},
    ),
    "olmoe": (
        "hf-olmoe",
        "OlmoeConfig",
        {"intermediate_size": 24, "num_experts": 5, "num_experts_per_tok": 3, "rms_norm_eps": 1e-2},
    ),
    "olmoe, weights sum to 1": (
        "hf-olmoe",
        "OlmoeConfig",
        {"intermediate_size": 16, "num_experts": 12, "num_experts_per_tok": 4, "norm_topk_prob": True},
    ),
    "qwen3": (
        "hf-qwen3-moe",
        "Qwen3MoeConfig",
        {
            "intermediate_size": 48,
            "moe_intermediate_size": 24,
            "head_dim": 16,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
        },
    ),
    "qwen3, dense layers": (
        "hf-qwen3-moe",
        "Qwen3MoeConfig",
        {
            "num_hidden_layers": 5,
            "intermediate_size": 40,
            "moe_intermediate_size": 16,
            "num_experts": 7,
            "num_experts_per_tok": 2,
            "mlp_only_layers": [0],
            "decoder_sparse_step": 2,
            "tie_word_embeddings": True,
        },
    ),
    "glm4": (
        "hf-glm4-moe",
        "Glm4MoeConfig",
        {
            "num_hidden_layers": 3,
            "intermediate_size": 48,
            "moe_intermediate_size": 24,
            "head_dim": 12,
            "n_routed_experts": 6,
            "num_experts_per_tok": 3,
            "n_group": 3,
            "topk_group": 2,
            "n_shared_experts": 2,
            "routed_scaling_factor": 2.5,
            "attention_bias": True,
            "use_qk_norm": True,
        },
    ),
    "glm4, plain": (
        "hf-glm4-moe",
        "Glm4MoeConfig",
        {
            "intermediate_size": 48,
            "moe_intermediate_size": 16,
            "n_routed_experts": 10,
            "num_experts_per_tok": 2,
            "norm_topk_prob": False,
            "partial_rotary_factor": 0.25,
            "head_dim": 16,
            "first_k_dense_replace": 0,
        },
    ),
    "deepseek": (
        "hf-deepseek-v3",
        "DeepseekV3Config",
        {
            "num_hidden_layers": 3,
            "num_key_value_heads": 4,
            "intermediate_size": 48,
            "moe_intermediate_size": 24,
            "q_lora_rank": 20,
            "kv_lora_rank": 12,
            "qk_nope_head_dim": 10,
            "qk_rope_head_dim": 6,
            "v_head_dim": 14,
            "n_routed_experts": 6,
            "num_experts_per_tok": 3,
            "n_group": 3,
            "topk_group": 2,
            "n_shared_experts": 2,
            "first_k_dense_replace": 1,
            "rms_norm_eps": 1e-3,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 500.5,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "beta_fast": 4,
                "beta_slow": 0.5,
                "mscale": 0.8,
                "mscale_all_dim": 1.3,
            },
        },
    ),
    "deepseek, plain": (
        "hf-deepseek-v3",
        "DeepseekV3Config",
        {
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "intermediate_size": 40,
            "moe_intermediate_size": 16,
            "q_lora_rank": None,
            "kv_lora_rank": 9,
            "qk_nope_head_dim": 4,
            "qk_rope_head_dim": 8,
            "v_head_dim": 7,
            "n_routed_experts": 5,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": False,
            "routed_scaling_factor": 1.0,
            "first_k_dense_replace": 0,
            "tie_word_embeddings": True,
        },
    ),
}


@dataclass
class Foreign:
    """A model of transformers and the folder that it was saved in."""

    format: str
    folder: Path
    model: Any

    def logits(self, tokens_BS: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return self.model(tokens_BS, use_cache=False).logits


def build_foreign(case: str, folder: Path, dtype: torch.dtype = torch.float32, **more: Any) -> Foreign:
    """Build with random weights, gains and biases included, and save."""
    import transformers

    name, kind, keys = FOREIGN[case]
    config = getattr(transformers, kind)(**{**COMMON, **keys})
    config._attn_implementation = "eager"
    torch.manual_seed(sum(map(ord, case)))
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
        for key, buffer in model.named_buffers():
            if key.endswith("e_score_correction_bias"):
                buffer.add_(0.2 * torch.randn(buffer.shape))
        model.lm_head.weight.mul_(0.3)
    model = model.to(dtype).eval()
    model.save_pretrained(folder, **more)
    return Foreign(name, folder, model)


@pytest.fixture(scope="session")
def make_foreign(one_rank: Any) -> Callable[..., Foreign]:
    return build_foreign


@pytest.fixture(scope="session", params=FOREIGN)
def foreign(request: pytest.FixtureRequest, one_rank: Any, tmp_path_factory: pytest.TempPathFactory) -> Foreign:
    return build_foreign(request.param, tmp_path_factory.mktemp("foreign") / "model")


@pytest.fixture(scope="session")
def mixtral(one_rank: Any, tmp_path_factory: pytest.TempPathFactory) -> Foreign:
    return build_foreign("mixtral", tmp_path_factory.mktemp("foreign") / "mixtral")


@pytest.fixture(scope="session")
def convert(one_rank: Any) -> Callable[..., Any]:
    """`checkpoint.convert.convert.convert` in this process's world."""
    from moescale.checkpoint.convert.convert import convert as convert_folder

    def run(source: Path, target: Path, to: str, **more: Any) -> Any:
        return convert_folder(source, target, to, **{"groups": one_rank, **more})

    return run


@pytest.fixture(scope="session")
def make_ours(one_rank: Any) -> Callable[..., dict[tuple[str, str], torch.Tensor]]:
    """``make_ours(folder, model, moe, vocab)``: a run's folder with random tensors, which it returns."""
    import yaml

    from moescale.checkpoint.convert.formats import Architecture, logical_tensors
    from moescale.checkpoint.storage import write_whole

    def make(folder: Path, model: Any, moe: Any = None, vocab: int = 100) -> dict[tuple[str, str], torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        found = Architecture(model, moe, vocab)
        tensors = {
            key: torch.randn(shape, generator=generator) * (0.3 if len(shape) == 2 else 1)
            for key, shape in logical_tensors(found).items()
        }
        folder.mkdir(parents=True)
        sections = {"model": model.model_dump(mode="json"), "moe": None if moe is None else moe.model_dump(mode="json")}
        (folder / "config.yaml").write_text(yaml.safe_dump(sections))
        extra = {"optimizer_steps": 3, "vocab": vocab, "special": {"eos_token_id": 1}}
        write_whole(folder / "checkpoints", 3, ((*key, tensor) for key, tensor in tensors.items()), extra)
        return tensors

    return make
