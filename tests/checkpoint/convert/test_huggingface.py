"""Both ways between transformers and ours: bit-equal tensors, equal logits, everything accounted for."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from moescale.models.config import ModelConfig
from moescale.models.mla_config import MLAConfig, YarnConfig
from moescale.moe import MoEConfig

TOLERANCE = 1e-5
OURS: dict[str, tuple[str, ModelConfig, MoEConfig | None]] = {
    "llama": ("hf-llama", ModelConfig(layers=3, width=48, heads=6, kv_heads=2, tied=False, ffn=56), None),
    "llama, tied": ("hf-llama", ModelConfig(layers=2, width=32, heads=2, max_seq=80, norm_eps=1e-4), None),
    "mixtral": (
        "hf-mixtral",
        ModelConfig(layers=2, width=32, heads=4, kv_heads=1, head_dim=6, rope_base=77),
        MoEConfig(experts=5, active=3, granularity=8, score="softmax_normalized"),
    ),
    "olmoe": (
        "hf-olmoe",
        ModelConfig(layers=2, width=32, heads=4, kv_heads=2, qk_norm="full", tied=False),
        MoEConfig(experts=7, active=2, expert_width=24),
    ),
    "qwen3": (
        "hf-qwen3-moe",
        ModelConfig(layers=4, width=32, heads=3, kv_heads=3, head_dim=10, qk_norm="head"),
        MoEConfig(experts=6, active=1, expert_width=16, first_dense=1, every=2),
    ),
    "glm4": (
        "hf-glm4-moe",
        ModelConfig(
            layers=3, width=32, heads=4, kv_heads=2, head_dim=12, rotary_fraction=0.5, qkv_bias=True, qk_norm="head"
        ),
        MoEConfig(
            experts=9,
            active=3,
            expert_width=24,
            shared=2,
            first_dense=2,
            score="sigmoid_normalized",
            groups=3,
            groups_active=2,
            weight_scale=1.7,
            bias_rate=0.001,
        ),
    ),
    "deepseek": (
        "hf-deepseek-v3",
        ModelConfig(
            layers=3,
            width=32,
            heads=5,
            rope_base=300,
            mla=MLAConfig(q_rank=18, kv_rank=10, nope_dim=6, rope_dim=8, value_dim=9),
            yarn=YarnConfig(factor=6, original_seq=20, beta_fast=3, beta_slow=0.2),
        ),
        MoEConfig(
            experts=8,
            active=3,
            expert_width=16,
            shared=1,
            first_dense=1,
            score="sigmoid_normalized",
            groups=4,
            groups_active=2,
            weight_scale=2.5,
            bias_rate=0.001,
        ),
    ),
    "deepseek, queries without a latent": (
        "hf-deepseek-v3",
        ModelConfig(
            layers=1, width=40, heads=2, tied=False, mla=MLAConfig(kv_rank=7, nope_dim=10, rope_dim=2, value_dim=16)
        ),
        MoEConfig(experts=4, active=1, expert_width=8, shared=2, score="sigmoid"),
    ),
}


def tokens_of(vocab: int = 100) -> torch.Tensor:
    return torch.randint(0, vocab, (3, 40), generator=torch.Generator().manual_seed(5))


def worst(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def our_logits(folder: Path, one_rank: Any, tokens: torch.Tensor) -> torch.Tensor:
    from moescale.checkpoint.convert.run_folder import RunFolder

    ours = RunFolder()
    return ours.logits(folder, ours.open(folder, None).architecture, tokens, "fp32", one_rank)


def test_there_and_back(foreign: Any, convert: Callable[..., Any], one_rank: Any, tmp_path: Path) -> None:
    """Logits as transformers computes them from its own model in memory; then every bit comes back."""
    ledger = convert(foreign.folder, tmp_path / "ours", "moescale")
    assert ledger.logits["largest_difference"] < TOLERANCE * ledger.logits["largest"]
    assert worst(our_logits(tmp_path / "ours", one_rank, tokens_of()), foreign.logits(tokens_of())) < TOLERANCE
    original = load_file(foreign.folder / "model.safetensors")
    assert {entry.name for entry in ledger.entries} == set(original)
    assert all(entry.fate == "converted" for entry in ledger.entries)
    back = convert(tmp_path / "ours", tmp_path / "back", foreign.format)
    assert back.logits["compared"]
    returned = load_file(tmp_path / "back" / "model.safetensors")
    assert returned.keys() == original.keys()
    for name, tensor in original.items():
        assert torch.equal(returned[name], tensor), name


def test_the_configuration_comes_back(foreign: Any, convert: Callable[..., Any], tmp_path: Path) -> None:
    """As transformers reads both files: every attribute that decides what is computed, and the special tokens."""
    from transformers import AutoConfig

    convert(foreign.folder, tmp_path / "ours", "moescale", check=False)
    convert(tmp_path / "ours", tmp_path / "back", foreign.format, check=False)
    free = {"router_aux_loss_coef", "initializer_range", "transformers_version", "_name_or_path"}
    free |= {"decoder_sparse_step", "mlp_only_layers", "num_nextn_predict_layers", "num_mtp_layers"}
    free |= {"moe_layer_freq", "scoring_func", "topk_method"}  # of DeepSeek's own code
    one, other = (AutoConfig.from_pretrained(folder).to_dict() for folder in (foreign.folder, tmp_path / "back"))
    head_dim = one["hidden_size"] // one["num_attention_heads"]
    for config in (one, other):
        config["head_dim"] = config.get("head_dim") or head_dim
        config["rope_parameters"].pop("type", None)  # the older word for rope_type
    assert {key: value for key, value in one.items() if key not in free} == {
        key: value for key, value in other.items() if key not in free
    }


@pytest.mark.parametrize("case", OURS)
def test_ours_there_and_back(
    case: str, make_ours: Callable[..., Any], convert: Callable[..., Any], one_rank: Any, tmp_path: Path
) -> None:
    """The real rows of embedding and head, and every other tensor, bit for bit; the same logits to the last bit."""
    name, model, moe = OURS[case]
    tensors = make_ours(tmp_path / "ours", model, moe)
    ledger = convert(tmp_path / "ours", tmp_path / "there", name)
    assert ledger.logits["largest_difference"] < TOLERANCE * ledger.logits["largest"]
    convert(tmp_path / "there", tmp_path / "back", "moescale")
    from moescale.checkpoint.convert.run_folder import RunFolder

    returned = RunFolder().open(tmp_path / "back", None)
    assert returned.architecture.vocab == 100
    assert returned.architecture.special == {"eos_token_id": 1}
    for (part, name), tensor in tensors.items():
        found = returned.whole(part, name)
        real = 100 if name in ("embedding", "head") else len(tensor)
        assert torch.equal(found[:real], tensor[:real]), name
        assert not found[real:].any()
    first, second = (our_logits(tmp_path / side, one_rank, tokens_of()) for side in ("ours", "back"))
    assert torch.equal(first, second)


@pytest.mark.parametrize("case", ["glm4", "deepseek"])
def test_what_decides_the_function_survives(
    case: str, make_ours: Callable[..., Any], convert: Callable[..., Any], tmp_path: Path
) -> None:
    """Our configuration through theirs and back: equal but for what acts in training only."""
    from moescale.checkpoint.convert.run_folder import RunFolder

    name, model, moe = OURS[case]
    make_ours(tmp_path / "ours", model, moe)
    convert(tmp_path / "ours", tmp_path / "there", name, check=False)
    convert(tmp_path / "there", tmp_path / "back", "moescale", check=False)
    found = RunFolder().open(tmp_path / "back", None).architecture
    assert found.model == model
    assert found.moe == moe


def test_deepseeks_own_spelling(
    make_foreign: Callable[..., Any], convert: Callable[..., Any], one_rank: Any, tmp_path: Path
) -> None:
    """The keys of its published config.json: older positions, words of its own code, without transformers' defaults."""
    foreign = make_foreign("deepseek", tmp_path / "model")
    path = foreign.folder / "config.json"
    content = json.loads(path.read_text())
    positions = content.pop("rope_parameters")
    content["rope_theta"] = positions.pop("rope_theta")
    content["rope_scaling"] = {"type": positions.pop("rope_type"), **positions}
    for key in ("head_dim", "qk_head_dim", "rope_interleave"):
        content.pop(key, None)
    content |= {
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
        "ep_size": 1,
        "moe_layer_freq": 1,
    }
    content |= {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "seq_aux": True, "aux_loss_alpha": 0.001}
    path.write_text(json.dumps(content))
    ledger = convert(foreign.folder, tmp_path / "ours", "moescale")
    assert ledger.logits["compared"]
    assert worst(our_logits(tmp_path / "ours", one_rank, tokens_of()), foreign.logits(tokens_of())) < TOLERANCE


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_rounding(dtype: str, make_ours: Callable[..., Any], convert: Callable[..., Any], tmp_path: Path) -> None:
    """Parameters are rounded, the selection bias is not, and logits are compared with the rounded weights."""
    name, model, moe = OURS["glm4"]
    tensors = make_ours(tmp_path / "ours", model, moe)
    ledger = convert(tmp_path / "ours", tmp_path / "there", name, dtype=dtype)
    assert ledger.logits["largest_difference"] < TOLERANCE * ledger.logits["largest"]
    stored = load_file(tmp_path / "there" / "model.safetensors")
    wanted = torch.bfloat16 if dtype == "bf16" else torch.float16
    assert torch.equal(
        stored["model.layers.2.mlp.experts.8.gate_proj.weight"],
        tensors["master", "layers.2.moe.experts.8.gate"].to(wanted),
    )
    assert torch.equal(
        stored["model.layers.2.mlp.gate.e_score_correction_bias"], tensors["buffer", "layers.2.moe.bias"]
    )
    assert json.loads((tmp_path / "there" / "config.json").read_text())["torch_dtype"] == str(wanted).split(".")[1]


def test_a_model_saved_in_bf16_and_in_parts(
    make_foreign: Callable[..., Any], convert: Callable[..., Any], tmp_path: Path
) -> None:
    foreign = make_foreign("mixtral", tmp_path / "model", torch.bfloat16, max_shard_size="40KB")
    files = sorted(path.name for path in foreign.folder.glob("*.safetensors"))
    assert len(files) > 2
    convert(foreign.folder, tmp_path / "ours", "moescale")
    ledger = convert(tmp_path / "ours", tmp_path / "back", "hf-mixtral", dtype="bf16")
    assert ledger.logits["compared"]
    original = {name: tensor for file in files for name, tensor in load_file(foreign.folder / file).items()}
    returned = load_file(tmp_path / "back" / "model.safetensors")
    assert returned.keys() == original.keys()
    assert all(torch.equal(returned[name], tensor) for name, tensor in original.items())


def test_without_a_selection_bias_zeros_are_written(
    make_ours: Callable[..., Any], convert: Callable[..., Any], tmp_path: Path
) -> None:
    _, model, moe = OURS["glm4"]
    assert moe is not None
    make_ours(tmp_path / "ours", model, moe.model_copy(update={"bias_rate": 0.0}))
    ledger = convert(tmp_path / "ours", tmp_path / "there", "hf-glm4-moe")
    assert [target.name for target in ledger.targets if target.why] == [
        "model.layers.2.mlp.gate.e_score_correction_bias"
    ]
    assert not load_file(tmp_path / "there" / "model.safetensors")[
        "model.layers.2.mlp.gate.e_score_correction_bias"
    ].any()


def test_tokenizer_files_go_along(mixtral: Any, convert: Callable[..., Any], tmp_path: Path) -> None:
    import shutil

    shutil.copytree(mixtral.folder, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text('{"version": "1.0"}')
    (tmp_path / "model" / "README.md").write_text("hello")
    ledger = convert(tmp_path / "model", tmp_path / "ours", "moescale", check=False)
    assert ledger.files == ["generation_config.json", "tokenizer.json"]
    convert(tmp_path / "ours", tmp_path / "back", "hf-mixtral", check=False)
    assert (tmp_path / "back" / "tokenizer.json").read_text() == '{"version": "1.0"}'
    assert not (tmp_path / "back" / "README.md").exists()


@pytest.mark.parametrize("case", ["glm4", "deepseek"])
def test_layers_that_predict_further_tokens_are_left_out(
    case: str, make_foreign: Callable[..., Any], convert: Callable[..., Any], tmp_path: Path
) -> None:
    """As these are published: one more layer in the files, which transformers passes over too. Any dtype will do."""
    from safetensors.torch import save_file

    foreign = make_foreign(case, tmp_path / "model")
    path = foreign.folder / "model.safetensors"
    tensors = load_file(path)
    further = {"model.layers.3.eh_proj.weight": torch.ones(32, 64), "model.layers.3.enorm.weight": torch.ones(32)}
    further["model.layers.3.scale"] = torch.ones(3, dtype=torch.int8)
    save_file({**tensors, **further}, path, metadata={"format": "pt"})
    ledger = convert(foreign.folder, tmp_path / "ours", "moescale")
    left = {entry.name: entry.why for entry in ledger.entries if entry.fate == "left out"}
    assert left.keys() == further.keys()
    assert all("predicts further tokens" in why for why in left.values())


def test_a_stored_tied_head_must_be_the_embedding(
    make_foreign: Callable[..., Any], convert: Callable[..., Any], tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    from moescale.base.errors import UserError

    foreign = make_foreign("llama, tied, other positions", tmp_path / "model")
    path = foreign.folder / "model.safetensors"
    tensors = load_file(path)
    head = tensors["model.embed_tokens.weight"].clone()
    save_file({**tensors, "lm_head.weight": head}, path, metadata={"format": "pt"})
    ledger = convert(foreign.folder, tmp_path / "ours", "moescale")
    assert [entry.name for entry in ledger.entries if entry.fate == "left out"] == ["lm_head.weight"]
    head[3, 4] += 1
    save_file({**tensors, "lm_head.weight": head}, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"tie_word_embeddings is true and lm_head\.weight differs"):
        convert(foreign.folder, tmp_path / "again", "moescale")
