"""Megatron-core's distributed checkpoints both ways, judged by its own forward and its own ``dist_checkpointing``."""

import re
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from megatron_cases import CASES, DENSE, MIXTURE, MODELS, VOCAB
from torch import Tensor

from moescale.base.errors import UserError
from moescale.checkpoint.convert.formats import Architecture, logical_tensors
from moescale.checkpoint.convert.megatron_files import DistCheckpoint
from moescale.checkpoint.convert.megatron_writer import DistWriter
from moescale.models.config import ModelConfig
from moescale.moe import MoEConfig

WORKER = Path(__file__).parents[2] / "helpers" / "megatron_worker.py"
NORMS = ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight")
OF_LATENTS = ("q_layernorm.weight", "q_up_proj.layer_norm_weight", "kv_up_proj.layer_norm_weight")


@pytest.fixture(scope="session")
def saved_by_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint, and its logits, of each case; two real ranks of Megatron-core made them."""
    folder = tmp_path_factory.mktemp("megatron")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    done = subprocess.run([sys.executable, str(WORKER), port, str(folder)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


def load_by_megatron(folder: Path, found: Architecture) -> Any:
    """Megatron-core's GPTModel with what its own ``dist_checkpointing.load`` finds in a folder of ours."""
    from megatron.core import dist_checkpointing

    from moescale.checkpoint.convert.megatron_model import build_model

    model = build_model(found).eval()
    state = dist_checkpointing.load(model.sharded_state_dict(), str(folder))
    kept = {name: value for name, value in state.items() if name in model.state_dict() and isinstance(value, Tensor)}
    assert not [k for k in model.load_state_dict(kept, strict=False).missing_keys if not k.endswith("_extra_state")]
    return model


def logits_of(model: Any, tokens_BS: Tensor) -> Tensor:
    length = tokens_BS.shape[1]
    with torch.no_grad():
        hidden = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
        logits: Tensor = model(tokens_BS, torch.arange(length).expand_as(tokens_BS), hidden)
    return logits[..., :VOCAB]


def tensors_of(folder: Path) -> dict[str, Tensor]:
    checkpoint = DistCheckpoint(folder)
    return {
        name: checkpoint.box(name, (0,) * len(tensor.shape), tensor.shape)
        for name, tensor in checkpoint.tensors.items()
    }


@pytest.mark.distributed
@pytest.mark.parametrize("name", CASES)
def test_from_any_layout_to_ours_and_back_is_the_same_model(
    name: str, saved_by_ranks: Path, convert: Callable[..., Any], one_rank: Any, tmp_path: Path
) -> None:
    """Bit for bit, and by Megatron's forward on its ranks, on one rank, and by ours."""
    from moescale.checkpoint.convert.megatron import MegatronSource
    from moescale.checkpoint.convert.run_folder import RunFolder

    case, source = CASES[name], saved_by_ranks / name
    ours = convert(source, tmp_path / "ours", "moescale", given=case.found)
    back = convert(tmp_path / "ours", tmp_path / "back", "megatron")
    assert ours.logits["largest_difference"] <= 1e-5 * ours.logits["largest"]
    assert back.logits["largest_difference"] <= 1e-5 * back.logits["largest"]

    one, other = MegatronSource(source, case.found), MegatronSource(tmp_path / "back", None)
    for logical in logical_tensors(case.found):
        assert torch.equal(one.whole(*logical), other.whole(*logical)), logical
    before, after = tensors_of(source), tensors_of(tmp_path / "back" / "release")
    if not case.metadata:
        assert before.keys() <= after.keys()
        assert all(name.endswith((*NORMS, *OF_LATENTS)) for name in after.keys() - before.keys())
        for key, tensor in before.items():
            assert torch.equal(tensor, after[key]), key
    logits_files = sorted(saved_by_ranks.glob(f"{name}.logits-*.pt"))
    assert logits_files
    model = load_by_megatron(tmp_path / "back" / "release", case.found)
    for file in logits_files:
        tokens_BS, wanted = torch.load(file)
        for found in (
            logits_of(model, tokens_BS),
            RunFolder().logits(tmp_path / "ours", case.found, tokens_BS, "fp32", one_rank),
        ):
            assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.distributed
def test_a_checkpoint_without_arguments_asks_for_them(
    saved_by_ranks: Path, convert: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"holds tensors and no arguments .* give --config RUN\.yaml"):
        convert(saved_by_ranks / "dense, tensor", tmp_path / "ours", "moescale")


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"layers": 3}, r"linear_qkv\.layer_norm_weight has shape \(2, 32\); the architecture says \(3, 32\)"),
        ({"ffn": 48}, r"mlp\.linear_fc1\.weight has shape \(2, 80, 32\); the architecture says \(2, 96, 32\)"),
        ({"kv_heads": 4}, r"linear_qkv\.weight has shape"),
        ({"tied": True}, r"output_layer\.weight"),
        ({"qk_norm": "head"}, r"q_layernorm\.weight"),
        ({"width": 40, "head_dim": 8}, r"embedding\.word_embeddings\.weight has shape"),
    ],
)
def test_a_configuration_that_the_tensors_contradict_is_refused(
    saved_by_ranks: Path, convert: Callable[..., Any], tmp_path: Path, changes: dict[str, Any], complaint: str
) -> None:
    given = replace(DENSE, model=ModelConfig(**{**DENSE.model.model_dump(), **changes}))
    with pytest.raises(UserError, match=complaint):
        convert(saved_by_ranks / "dense, tensor", tmp_path / "ours", "moescale", given=given)
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("name", MODELS)
def test_ours_to_megatron_and_back_is_bit_equal_with_its_configuration(
    name: str, make_ours: Callable[..., Any], convert: Callable[..., Any], tmp_path: Path
) -> None:
    from moescale.checkpoint.convert.run_folder import RunFolder

    found = MODELS[name]
    tensors = make_ours(tmp_path / "run", found.model, found.moe, VOCAB)
    convert(tmp_path / "run", tmp_path / "megatron", "megatron")
    convert(tmp_path / "megatron", tmp_path / "back", "moescale")
    source = RunFolder().open(tmp_path / "back", None)
    assert source.architecture.special == {"eos_token_id": 1}
    assert logical_tensors(source.architecture) == logical_tensors(found)
    for key, tensor in tensors.items():
        assert torch.equal(source.whole(*key), tensor), key
    for key in ("layers", "heads", "rope_base", "norm_eps", "rotary_fraction", "qkv_bias"):
        assert getattr(source.architecture.model, key) == getattr(found.model, key)


def test_a_dtype_rounds_parameters_and_not_the_bias(
    make_ours: Callable[..., Any], convert: Callable[..., Any], tmp_path: Path
) -> None:
    make_ours(tmp_path / "run", MIXTURE.model, MIXTURE.moe, VOCAB)
    ledger = convert(tmp_path / "run", tmp_path / "megatron", "megatron", dtype="bf16")
    checkpoint = DistCheckpoint(tmp_path / "megatron" / "release")
    kinds = {name: tensor.dtype for name, tensor in checkpoint.tensors.items()}
    assert kinds.pop("decoder.layers.mlp.router.expert_bias") == "float32"
    assert set(kinds.values()) == {"bfloat16"}
    assert ledger.logits["largest_difference"] <= 1e-5 * ledger.logits["largest"]


def rewritten(folder: Path, change: Callable[[str, Tensor], dict[str, Tensor]]) -> Path:
    """A copy of a checkpoint of ours with other tensors; the arguments stay."""
    (folder / "other").mkdir()
    writer = DistWriter(folder / "other", {})
    for name, tensor in tensors_of(folder / "release").items():
        for other, values in change(name, tensor).items():
            writer.add(other, tuple(values.shape), (0,) * values.dim(), values)
    writer.close()
    (folder / "other" / "common.pt").write_bytes((folder / "release" / "common.pt").read_bytes())
    return folder / "other"


@pytest.fixture
def mixture(make_ours: Callable[..., Any], convert: Callable[..., Any], tmp_path: Path) -> Path:
    make_ours(tmp_path / "run", MIXTURE.model, MIXTURE.moe, VOCAB)
    convert(tmp_path / "run", tmp_path / "megatron", "megatron", check=False)
    return tmp_path / "megatron"


@pytest.mark.parametrize("left", NORMS)
def test_the_norm_before_a_mixture_goes_by_either_name(
    mixture: Path, convert: Callable[..., Any], tmp_path: Path, left: str
) -> None:
    """Transformer Engine's layers and local specs call it differently."""
    gone = next(name for name in NORMS if name != left)
    other = rewritten(mixture, lambda name, values: {} if name.endswith(gone) else {name: values})
    ledger = convert(other, tmp_path / "ours", "moescale")
    assert ledger.logits["largest_difference"] <= 1e-5 * ledger.logits["largest"]


def test_transformer_engine_has_the_norms_of_latents_in_the_projections(
    make_ours: Callable[..., Any], convert: Callable[..., Any], tmp_path: Path
) -> None:
    from moescale.checkpoint.convert.megatron import MegatronSource

    found = MODELS["deepseek"]
    tensors = make_ours(tmp_path / "run", found.model, found.moe, VOCAB)
    convert(tmp_path / "run", tmp_path / "megatron", "megatron", check=False)
    gone = (".q_layernorm.weight", ".kv_layernorm.weight")
    other = rewritten(tmp_path / "megatron", lambda name, values: {} if name.endswith(gone) else {name: values})
    source = MegatronSource(other, None)
    for name, projection in (("q_norm", "linear_q_up_proj"), ("kv_norm", "linear_kv_up_proj")):
        key = ("master", f"layers.1.attention.{name}")
        assert source.made_of(*key) == (f"decoder.layers.1.self_attention.{projection}.layer_norm_weight",)
        assert torch.equal(source.whole(*key), tensors[key])


def test_two_names_of_one_norm_that_differ_are_refused(
    mixture: Path, convert: Callable[..., Any], tmp_path: Path
) -> None:
    other = rewritten(mixture, lambda name, values: {name: values + 1 if name.endswith(NORMS[0]) else values})
    with pytest.raises(UserError, match=r"pre_mlp_layernorm\.weight and .*are one tensor .*and differ"):
        convert(other, tmp_path / "ours", "moescale", check=False)


def test_a_lost_and_a_stray_tensor_have_names(mixture: Path, convert: Callable[..., Any], tmp_path: Path) -> None:
    """Experts apart, so that one can be lost."""
    stacked = "decoder.layers.mlp.experts.experts.linear_fc2.weight"

    def apart(name: str, values: Tensor) -> dict[str, Tensor]:
        if name != stacked:
            return {name: values}
        names = {e: name.replace("experts.experts.", f"experts.experts.{e}.") for e in range(values.shape[1])}
        return {other: values[:, e] for e, other in names.items() if e != 4}

    with pytest.raises(UserError, match=r"do not hold: .*linear_fc2\.weight \(layers\.0\.moe\.experts\.4\.down\)"):
        convert(rewritten(mixture, apart), tmp_path / "ours", "moescale", check=False)
    (mixture / "other").rename(tmp_path / "first")
    stray = rewritten(
        mixture,
        lambda name, values: {name: values, **({"stray.weight": values} if name.endswith("proj.weight") else {})},
    )
    with pytest.raises(UserError, match=r"no use for: stray\.weight"):
        convert(stray, tmp_path / "ours", "moescale", check=False)


def test_an_optimizers_state_is_left_out_and_listed(mixture: Path, convert: Callable[..., Any], tmp_path: Path) -> None:
    moment = "optimizer.state.exp_avg.embedding.word_embeddings.weight"
    other = rewritten(
        mixture, lambda name, values: {name: values, **({moment: values} if name.startswith("embedding") else {})}
    )
    ledger = convert(other, tmp_path / "ours", "moescale", check=False)
    entry = next(entry for entry in ledger.entries if entry.name == moment)
    assert entry.fate == "left out"
    assert "optimizer" in entry.why


def test_more_rows_of_padding_than_ours_are_cut_and_fewer_filled(
    mixture: Path, convert: Callable[..., Any], tmp_path: Path
) -> None:
    from moescale.checkpoint.convert.run_folder import RunFolder

    for rows in (VOCAB, 1024):
        other = rewritten(
            mixture,
            lambda name, values, rows=rows: {  # type: ignore[misc]
                name: torch.cat([values[:VOCAB], torch.ones(rows - VOCAB, 32)]) if len(values) == 128 else values
            },
        )
        convert(other, tmp_path / f"ours-{rows}", "moescale")
        found = RunFolder().open(tmp_path / f"ours-{rows}", None).whole("master", "embedding")
        assert found.shape == (128, 32)
        assert torch.equal(found[:VOCAB], RunFolder().open(tmp_path / "run", None).whole("master", "embedding")[:VOCAB])
        (mixture / "other").rename(tmp_path / f"other-{rows}")


def test_the_tracker_names_the_checkpoint(mixture: Path, convert: Callable[..., Any], tmp_path: Path) -> None:
    (mixture / "release").rename(mixture / "iter_0000120")
    (mixture / "latest_checkpointed_iteration.txt").write_text("120\n")
    convert(mixture, tmp_path / "ours", "moescale", check=False)
    (mixture / "latest_checkpointed_iteration.txt").write_text("../../etc")
    with pytest.raises(UserError, match="is no number of an iteration"):
        convert(mixture, tmp_path / "again", "moescale", check=False)


@pytest.mark.parametrize(
    ("model", "moe", "complaint"),
    [
        ({"qk_norm": "full"}, None, r"model\.qk_norm \(full\)"),
        (
            {"mla": {"kv_rank": 8, "nope_dim": 4, "rope_dim": 4, "value_dim": 4}},
            None,
            r"model\.mla\.norm_eps \(1e-06\): Megatron-core has one epsilon for all norms, here .* \(1e-05\)",
        ),
        ({}, {"router": "expert_choice"}, r"moe\.router \(expert_choice\)"),
        ({}, {"score": "sigmoid"}, r"moe\.score \(sigmoid\) with moe\.active \(2\)"),
        ({}, {"score": "softmax_normalized", "active": 1}, r"moe\.score \(softmax_normalized\) with moe\.active \(1\)"),
        ({}, {"capacity": 1.5}, r"moe\.capacity \(1\.5\)"),
        ({}, {"bias_rate": 0.1}, r"moe\.bias_rate \(0\.1\)"),
        ({}, {"groups": 2, "groups_active": 1}, r"moe\.groups_active \(1\) with moe\.active \(2\)"),
    ],
)
def test_what_megatron_cannot_compute_is_refused_by_name(
    make_ours: Callable[..., Any],
    convert: Callable[..., Any],
    tmp_path: Path,
    model: dict[str, Any],
    moe: dict[str, Any] | None,
    complaint: str,
) -> None:
    mixture = None if moe is None else MoEConfig(**{"experts": 4, "active": 2, "expert_width": 16, **moe})
    make_ours(tmp_path / "run", ModelConfig(**{"layers": 2, "width": 32, "heads": 2, **model}), mixture, VOCAB)
    with pytest.raises(UserError, match=complaint):
        convert(tmp_path / "run", tmp_path / "megatron", "megatron")
    assert not (tmp_path / "megatron").exists()


def test_names_of_experts_are_those_of_the_layers(mixture: Path) -> None:
    names = DistCheckpoint(mixture / "release").tensors
    assert names["decoder.layers.mlp.experts.experts.linear_fc1.weight"].shape == (2, 6, 48, 32)
    assert not [name for name in names if re.search(r"\.\d+\.", name)]


def anonymous_bytes() -> int:
    """Memory of this process that no file backs."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", status)[1])  # type: ignore[index]


def test_memory_holds_one_tensor_and_what_it_is_fused_from(tmp_path: Path) -> None:
    """A model of 80 MB, whose largest fused tensor has 0.6 MB, both ways."""
    from moescale.checkpoint.convert.megatron import Megatron, MegatronSource

    found = Architecture(
        ModelConfig(layers=12, width=128, heads=4, ffn=256, tied=True),
        MoEConfig(experts=12, active=2, expert_width=360, score="softmax_normalized"),
        VOCAB,
    )
    shapes = logical_tensors(found)
    zeros = {shape: torch.zeros(shape) for shape in set(shapes.values())}
    before = anonymous_bytes()
    largest = 0

    def read(part: str, name: str) -> Tensor:
        nonlocal largest
        largest = max(largest, anonymous_bytes() - before)
        return zeros[shapes[part, name]].clone()

    written = list(Megatron().write(tmp_path, found, read, "fp32"))
    assert sum(4 * torch.Size(target.stored.shape).numel() for target in written) > 80e6
    source = MegatronSource(tmp_path, None)
    for key in shapes:
        source.whole(*key)
        largest = max(largest, anonymous_bytes() - before)
    assert largest < 8e6


def test_a_run_file_without_data_takes_its_vocabulary_from_the_arguments_or_the_embedding(
    mixture: Path, convert: Callable[..., Any], tmp_path: Path
) -> None:
    from moescale.checkpoint.convert.run_folder import RunFolder, given_architecture

    assert MIXTURE.moe is not None
    run_file = tmp_path / "given.yaml"
    sections = {"model": MIXTURE.model.model_dump(mode="json"), "moe": MIXTURE.moe.model_dump(mode="json")}
    run_file.write_text(yaml.safe_dump(sections))
    convert(mixture, tmp_path / "told", "moescale", given=given_architecture(run_file), check=False)
    assert RunFolder().open(tmp_path / "told", None).architecture.vocab == VOCAB
    (mixture / "release" / "common.pt").unlink()
    ledger = convert(mixture, tmp_path / "ours", "moescale", given=given_architecture(run_file))
    assert ledger.logits["largest_difference"] <= 1e-5 * ledger.logits["largest"]
    assert RunFolder().open(tmp_path / "ours", None).architecture.vocab == 128


def test_arguments_and_configuration_that_differ_are_refused(
    mixture: Path, convert: Callable[..., Any], tmp_path: Path
) -> None:
    given = replace(MIXTURE, model=MIXTURE.model.model_copy(update={"rope_base": 10_000}))
    with pytest.raises(UserError, match=r"arguments say model\.rope_base 500, --config says 10000"):
        convert(mixture, tmp_path / "ours", "moescale", given=given)


def test_what_is_no_distributed_checkpoint_is_told_so(convert: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "old" / "iter_0000010" / "mp_rank_00").mkdir(parents=True)
    (tmp_path / "old" / "latest_checkpointed_iteration.txt").write_text("10")
    with pytest.raises(
        UserError, match=r"a distributed checkpoint is expected \(Megatron-LM's --ckpt-format torch_dist"
    ):
        convert(tmp_path / "old", tmp_path / "ours", "moescale")
