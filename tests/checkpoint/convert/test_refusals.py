"""What cannot be converted is refused by name and value, and leaves nothing behind."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moescale.base.errors import UserError
from moescale.models.config import ModelConfig
from moescale.moe import MoEConfig

EXPERT = "model.layers.1.block_sparse_moe.experts.4.w2.weight"


@pytest.fixture
def model(mixtral: Any, tmp_path: Path) -> Path:
    """A copy of a Mixtral that may be damaged."""
    return Path(shutil.copytree(mixtral.folder, tmp_path / "model"))


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value != "absent"}))


def refused(convert: Callable[..., Any], folder: Path, to: str = "moescale", **more: Any) -> str:
    """What the conversion says, having left nothing behind."""
    target = folder.parent / "target"
    with pytest.raises(UserError) as caught:
        convert(folder, target, to, **more)
    assert not target.exists()
    assert not [entry.name for entry in folder.parent.iterdir() if entry.name.startswith(".")]
    return str(caught.value)


KEYS: list[tuple[dict[str, Any], str]] = [
    (
        {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "rope_theta": 1e4}},
        'rope_parameters.rope_type ("llama3")',
    ),
    ({"rope_parameters": {"rope_theta": 1e4, "attention_factor": 2}}, "rope_parameters.attention_factor (2)"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 'rope_scaling.type ("linear")'),
    ({"rope_scaling": "yarn"}, "rope_scaling ('yarn'): an object is expected"),
    (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "partial_rotary_factor",
    ),
    ({"sliding_window": 4096}, "sliding_window (4096) cannot be expressed; only null can"),
    ({"hidden_act": "gelu"}, 'hidden_act ("gelu") cannot be expressed; only "silu" or "swish" can'),
    ({"architectures": ["MixtralForSequenceClassification"]}, "MixtralForSequenceClassification"),
    ({"quantization_config": {"bits": 4}}, 'quantization_config ({"bits": 4})'),
    ({"logit_scale": 0.5, "new_key": None}, "logit_scale (0.5), new_key (null)"),
    ({"vocab_size": "absent"}, "vocab_size: required and not given"),
    ({"num_hidden_layers": "two"}, 'num_hidden_layers ("two"): a whole number is expected'),
    ({"num_local_experts": True}, "num_local_experts (true): a whole number is expected"),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings (1): true or false is expected"),
    ({"intermediate_size": 20}, "moe.expert_width (20) must be a multiple of 8"),
    ({"num_experts_per_tok": 9}, "moe.active (9) must not exceed moe.experts (6)"),
    ({"num_key_value_heads": 3}, "model.kv_heads (3) must divide model.heads (4)"),
    ({"rms_norm_eps": 0}, "norm_eps (0)"),
    ({"model_type": "gpt2"}, "its config.json says model_type gpt2"),
]


@pytest.mark.parametrize(("changes", "said"), KEYS, ids=[next(iter(changes)) for changes, _ in KEYS])
def test_keys(model: Path, convert: Callable[..., Any], changes: dict[str, Any], said: str) -> None:
    edit(model, **changes)
    assert said in refused(convert, model)


DEEPSEEK_KEYS: list[tuple[dict[str, Any], str]] = [
    ({"rope_interleave": False}, "rope_interleave (false) cannot be expressed; only true can"),
    ({"attention_bias": True}, "attention_bias (true) cannot be expressed"),
    ({"scoring_func": "softmax"}, 'scoring_func ("softmax") cannot be expressed; only "sigmoid" can'),
    ({"topk_method": "greedy"}, 'topk_method ("greedy")'),
    ({"moe_layer_freq": 2}, "moe_layer_freq (2)"),
    ({"head_dim": 16}, "head_dim (16) cannot be expressed; only 6 or null can"),
    ({"qk_head_dim": 64}, "qk_head_dim (64) cannot be expressed; only 16 or null can"),
    ({"num_key_value_heads": 2}, "model.kv_heads (2) does not go with model.mla, where it is 4"),
    ({"q_lora_rank": "absent"}, "q_lora_rank: required and not given"),
    ({"kv_lora_rank": None}, "kv_lora_rank (null): a whole number is expected"),
    ({"qk_rope_head_dim": 5, "head_dim": "absent", "qk_head_dim": "absent"}, "mla.rope_dim (5)"),
    ({"n_shared_experts": 0}, "moe.shared (0): hf-deepseek-v3 always has shared experts"),
    ({"first_k_dense_replace": 3}, "moe.first_dense (3) leaves no mixture among 3 layers"),
    ({"quantization_config": {"quant_method": "fp8"}}, 'quantization_config ({"quant_method": "fp8"})'),
    ({"rope_scaling": {"type": "yarn"}}, "rope_scaling and rope_parameters: one of them is expected"),
]
POSITIONS: list[tuple[dict[str, Any], str]] = [
    ({"attention_factor": 1.5}, "rope_parameters.attention_factor (1.5) cannot be expressed; only null can"),
    ({"truncate": False}, "rope_parameters.truncate (false) cannot be expressed"),
    ({"mscale": None}, "rope_parameters.mscale_all_dim (1.3) without rope_parameters.mscale"),
    ({"factor": None}, "yarn.factor (None)"),
    ({"rope_type": "linear"}, 'rope_parameters.rope_type ("linear") cannot be expressed; only "default" or "yarn" can'),
    ({"high_freq_factor": 2}, "rope_parameters.high_freq_factor (2)"),
]


@pytest.fixture(scope="module")
def deepseek(make_foreign: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(make_foreign("deepseek", tmp_path_factory.mktemp("deepseek") / "model").folder)


@pytest.mark.parametrize(("changes", "said"), DEEPSEEK_KEYS, ids=[next(iter(changes)) for changes, _ in DEEPSEEK_KEYS])
def test_deepseeks_keys(
    deepseek: Path, convert: Callable[..., Any], tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    model = Path(shutil.copytree(deepseek, tmp_path / "model"))
    edit(model, **changes)
    assert said in refused(convert, model)


@pytest.mark.parametrize(("changes", "said"), POSITIONS, ids=[next(iter(changes)) for changes, _ in POSITIONS])
def test_deepseeks_positions(
    deepseek: Path, convert: Callable[..., Any], tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    model = Path(shutil.copytree(deepseek, tmp_path / "model"))
    content = json.loads((model / "config.json").read_text())
    edit(model, rope_parameters={**content["rope_parameters"], **changes})
    assert said in refused(convert, model)


def change_tensors(folder: Path, *, drop: str = "", **added: torch.Tensor) -> None:
    path = folder / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(path).items() if name != drop}
    save_file({**tensors, **added}, path, metadata={"format": "pt"})


def test_a_dropped_expert_is_named(model: Path, convert: Callable[..., Any]) -> None:
    change_tensors(model, drop=EXPERT)
    said = refused(convert, model)
    assert "the configuration asks for tensors that the files do not hold" in said
    assert f"{EXPERT} (layers.1.moe.experts.4.down)" in said


def test_a_stray_tensor_is_named(model: Path, convert: Callable[..., Any]) -> None:
    change_tensors(model, **{"model.layers.1.block_sparse_moe.experts.6.w1.weight": torch.zeros(24, 32)})
    said = refused(convert, model)
    assert "no use for: model.layers.1.block_sparse_moe.experts.6.w1.weight" in said


def test_a_wrong_shape_is_named(model: Path, convert: Callable[..., Any]) -> None:
    change_tensors(model, **{EXPERT: torch.zeros(32, 16)})
    assert f"{EXPERT} has shape (32, 16); the configuration says (32, 24)" in refused(convert, model)


def test_other_dtypes_are_named(model: Path, convert: Callable[..., Any]) -> None:
    change_tensors(model, **{EXPERT: torch.zeros(32, 24, dtype=torch.int8)})
    assert f"{EXPERT} is stored as I8" in refused(convert, model)


def test_an_infinity_in_fp16_is_named(model: Path, convert: Callable[..., Any], tmp_path: Path) -> None:
    change_tensors(model, **{EXPERT: torch.full((32, 24), 1e5)})
    assert f"--dtype fp16: {EXPERT} holds values beyond 65504" in refused(convert, model, "hf-mixtral", dtype="fp16")


def test_a_truncated_file(model: Path, convert: Callable[..., Any]) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "model.safetensors: not a whole safetensors file" in refused(convert, model)


def test_pickles_are_not_read(model: Path, convert: Callable[..., Any]) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    assert "holds pytorch_model.bin and no safetensors; a pickle runs code" in refused(convert, model)
    (model / "pytorch_model.bin").unlink()
    assert "holds neither model.safetensors nor model.safetensors.index.json" in refused(convert, model)


def write_index(folder: Path, **places: str) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def test_an_index_that_lies(model: Path, convert: Callable[..., Any]) -> None:
    names = dict.fromkeys(load_file(model / "model.safetensors"), "model.safetensors")
    write_index(model, **names, more="model.safetensors")
    assert "promises more in model.safetensors, which does not hold it" in refused(convert, model)
    write_index(model, **{**names, EXPERT: "gone.safetensors"})
    assert "gone.safetensors: not a whole safetensors file" in refused(convert, model)
    write_index(model, **{**names, EXPERT: "../model/model.safetensors"})
    assert "must name a file of the same folder" in refused(convert, model)
    (model / "model.safetensors.index.json").write_text("{")
    assert "index.json: cannot be read" in refused(convert, model)


def test_files_that_are_not_in_the_index_are_not_the_models(model: Path, convert: Callable[..., Any]) -> None:
    """An adapter beside the model is none of its tensors."""
    save_file({"lora.a": torch.zeros(2)}, model / "adapter.safetensors")
    convert(model, model.parent / "target", "moescale", check=False)


def test_a_configuration_that_is_no_object(model: Path, convert: Callable[..., Any]) -> None:
    (model / "config.json").write_text("[1]")
    assert "config.json: a JSON object is expected, not a list" in refused(convert, model)
    (model / "config.json").write_text("{")
    assert "config.json: cannot be read" in refused(convert, model)


def test_places(model: Path, convert: Callable[..., Any], tmp_path: Path) -> None:
    assert "nowhere: no such folder" in refused(convert, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "is none of moescale, megatron, hf-llama" in refused(convert, tmp_path / "empty")
    assert "--to hf-gpt2: unknown; the formats are moescale, megatron, hf-llama" in refused(convert, model, "hf-gpt2")
    assert "--dtype bf16: a checkpoint of moescale holds fp32 masters" in refused(convert, model, dtype="bf16")
    with pytest.raises(UserError, match="model: exists already"):
        convert(model, model, "moescale")


def test_what_an_interrupted_conversion_left_is_no_obstacle(model: Path, convert: Callable[..., Any]) -> None:
    beside = model.parent / ".target.tmp"
    beside.mkdir()
    (beside / "config.yaml").write_text("half")
    convert(model, model.parent / "target", "moescale", check=False)
    assert not beside.exists()


DENSE = {"layers": 2, "width": 32, "heads": 4}
MIXTURE = {"experts": 4, "active": 2, "expert_width": 16}
SIGMOID = {**MIXTURE, "score": "sigmoid", "shared": 1}
LATENT = {"mla": {"kv_rank": 8, "nope_dim": 4, "rope_dim": 4, "value_dim": 4}}
INEXPRESSIBLE: list[tuple[str, dict[str, Any], dict[str, Any] | None, str]] = [
    ("hf-llama", {}, MIXTURE, "moe.experts (4): the model is a mixture"),
    ("hf-llama", {"qk_norm": "head"}, None, "model.qk_norm (head) cannot be expressed in hf-llama, which has none"),
    ("hf-llama", {"qkv_bias": True}, None, "model.qkv_bias (True)"),
    ("hf-llama", {"rotary_fraction": 0.5}, None, "model.rotary_fraction (0.5)"),
    ("hf-llama", {"heads": 3, "head_dim": 8}, None, "model.heads (3) must divide model.width (32) in hf-llama"),
    ("hf-mixtral", {}, None, "moe (none): the model is dense"),
    ("hf-mixtral", {}, MIXTURE, "moe.score (softmax) cannot be expressed in hf-mixtral, which has softmax_normalized"),
    ("hf-mixtral", {}, {**MIXTURE, "first_dense": 1}, "moe.first_dense (1) and moe.every (1) leave dense layers"),
    ("hf-olmoe", {}, MIXTURE, "model.qk_norm (none)"),
    ("hf-olmoe", {"qk_norm": "full", "head_dim": 16}, MIXTURE, "model.head_dim (16) must be model.width / model.heads"),
    ("hf-olmoe", {"qk_norm": "full"}, {**MIXTURE, "shared": 1}, "moe.shared (1) cannot be expressed in hf-olmoe"),
    ("hf-olmoe", {"qk_norm": "full"}, {**MIXTURE, "bias_rate": 0.1}, "moe.bias_rate (0.1)"),
    ("hf-olmoe", {"qk_norm": "full"}, {**MIXTURE, "capacity": 1.25}, "moe.capacity (1.25)"),
    ("hf-olmoe", {"qk_norm": "full"}, {**MIXTURE, "weight_scale": 2.0}, "moe.weight_scale (2.0)"),
    ("hf-qwen3-moe", {"qk_norm": "head"}, {**MIXTURE, "router": "hash"}, "moe.router (hash)"),
    ("hf-qwen3-moe", {"qk_norm": "head"}, {**MIXTURE, "score": "sigmoid"}, "moe.score (sigmoid)"),
    ("hf-qwen3-moe", {"qk_norm": "head"}, {**MIXTURE, "groups": 2}, "moe.groups (2)"),
    ("hf-glm4-moe", {}, {**MIXTURE, "score": "sigmoid"}, "moe.shared (0): hf-glm4-moe always has shared experts"),
    ("hf-glm4-moe", {}, {**MIXTURE, "score": "sigmoid", "shared": 1, "groups": 4}, "moe.groups (4) of moe.experts (4)"),
    ("hf-glm4-moe", {}, {**MIXTURE, "score": "sigmoid", "shared": 1, "every": 2}, "moe.every (2)"),
    ("hf-glm4-moe", {"qk_norm": "full"}, {**MIXTURE, "score": "sigmoid", "shared": 1}, "model.qk_norm (full)"),
    ("hf-glm4-moe", LATENT, SIGMOID, "model.mla (q_rank=None kv_rank=8"),
    ("hf-llama", LATENT, None, "cannot be expressed in hf-llama, which has none"),
    ("hf-qwen3-moe", LATENT, MIXTURE, "model.mla (q_rank=None kv_rank=8"),
    ("hf-deepseek-v3", LATENT, None, "moe (none): the model is dense"),
    ("hf-deepseek-v3", {}, SIGMOID, "model.mla (none): hf-deepseek-v3 has latent attention"),
    ("hf-deepseek-v3", LATENT, {**SIGMOID, "shared": 0}, "moe.shared (0): hf-deepseek-v3 always has shared experts"),
    ("hf-deepseek-v3", LATENT, {**SIGMOID, "score": "softmax"}, "moe.score (softmax)"),
    (
        "hf-deepseek-v3",
        {"mla": {**LATENT["mla"], "norm_eps": 1e-5}},
        SIGMOID,
        "model.mla.norm_eps (1e-05) cannot be expressed in hf-deepseek-v3, which has 1e-06",
    ),
    (
        "hf-deepseek-v3",
        {**LATENT, "yarn": {"factor": 4, "original_seq": 16, "mscale": 0.5}},
        SIGMOID,
        "model.yarn.mscale (0.5) with model.yarn.mscale_all_dim (0)",
    ),
]


@pytest.mark.parametrize(
    ("to", "keys", "mixture", "said"), INEXPRESSIBLE, ids=[f"{r[0]}-{n}" for n, r in enumerate(INEXPRESSIBLE)]
)
def test_what_a_format_cannot_express(
    to: str,
    keys: dict[str, Any],
    mixture: dict[str, Any] | None,
    said: str,
    make_ours: Callable[..., Any],
    convert: Callable[..., Any],
    tmp_path: Path,
) -> None:
    moe = None if mixture is None else MoEConfig(**{"groups_active": mixture.get("groups", 1), **mixture})
    make_ours(tmp_path / "ours", ModelConfig(**{**DENSE, **keys}), moe)
    assert said in refused(convert, tmp_path / "ours", to)


def test_qwens_layers_that_two_numbers_cannot_give(
    make_foreign: Callable[..., Any], convert: Callable[..., Any], tmp_path: Path
) -> None:
    foreign = make_foreign("qwen3, dense layers", tmp_path / "model")
    edit(foreign.folder, mlp_only_layers=[1, 2], decoder_sparse_step=1)
    assert "mlp_only_layers ([1, 2]) with decoder_sparse_step (1) cannot be expressed" in refused(
        convert, foreign.folder
    )
    edit(foreign.folder, mlp_only_layers=[0, 1, 2, 3, 4])
    assert "mlp_only_layers ([0, 1, 2, 3, 4])" in refused(convert, foreign.folder)


def test_our_own_folders(make_ours: Callable[..., Any], convert: Callable[..., Any], tmp_path: Path) -> None:
    make_ours(tmp_path / "ours", ModelConfig(**DENSE))
    checkpoint = tmp_path / "ours" / "checkpoints" / "step-00000003"
    shutil.copytree(checkpoint, tmp_path / "alone")
    assert "alone: a checkpoint without its run" in refused(convert, tmp_path / "alone", "hf-llama")
    config = tmp_path / "ours" / "config.yaml"
    kept = config.read_text()
    config.write_text(kept.replace("width: 32", "width: 40"))
    assert "has shape (128, 32); config.yaml says (128, 40)" in refused(convert, tmp_path / "ours", "hf-llama")
    config.write_text("moe: null\n")
    assert "has no model section" in refused(convert, tmp_path / "ours", "hf-llama")
    config.write_text(kept)
    shard = next(checkpoint.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-3] ^= 4
    shard.write_bytes(content)
    assert shard.name in refused(convert, tmp_path / "ours", "hf-llama")


def test_a_single_checkpoint_of_a_run(
    make_ours: Callable[..., Any], convert: Callable[..., Any], tmp_path: Path
) -> None:
    make_ours(tmp_path / "ours", ModelConfig(**DENSE))
    convert(tmp_path / "ours" / "checkpoints" / "step-00000003", tmp_path / "there", "hf-llama", check=False)
    assert (tmp_path / "there" / "model.safetensors").is_file()


def test_differing_logits_leave_nothing(
    make_ours: Callable[..., Any], convert: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A family that swaps gate and up loses no tensor: only the logits can tell."""
    from moescale.checkpoint.convert import hf_mixtral

    swapped = {
        **hf_mixtral.MIXTURE,
        "moe.experts.*.gate": hf_mixtral.MIXTURE["moe.experts.*.up"],
        "moe.experts.*.up": hf_mixtral.MIXTURE["moe.experts.*.gate"],
    }
    monkeypatch.setattr(hf_mixtral, "MIXTURE", swapped)
    make_ours(tmp_path / "ours", ModelConfig(**DENSE), MoEConfig(**MIXTURE, score="softmax_normalized"))
    assert "logits of both sides differ by" in refused(convert, tmp_path / "ours", "hf-mixtral")
