"""Upcycling: the mixture computes what the dense model did, and what could not is refused by name."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from moescale.base.errors import UserError
from moescale.checkpoint.convert.formats import Architecture, logical_tensors
from moescale.checkpoint.storage import write_whole
from moescale.checkpoint.upcycle import Upcycling, load_upcycling
from moescale.models.config import ModelConfig
from moescale.moe import MoEConfig
from moescale.scaling.record import read_record

VOCAB = 100
DENSE = ModelConfig(layers=4, width=32, heads=4, kv_heads=2, ffn=96, tied=False)
COPIES = {"experts": 6, "active": 2, "expert_width": 96, "score": "softmax_normalized"}
CASES: dict[str, dict[str, Any]] = {
    "copies": COPIES,
    "one copy a token": {**COPIES, "active": 1},
    "slices": {**COPIES, "expert_width": 32, "active": 3},
    "slices of several copies": {
        **COPIES, "experts": 24, "expert_width": 24, "active": 8, "first_dense": 1, "every": 2
    },
    "sigmoid, bias, scale": {
        **COPIES, "expert_width": 48, "active": 4, "score": "sigmoid_normalized", "bias_rate": 0.01, "weight_scale": 2.5
    },
    "groups": {**COPIES, "experts": 12, "expert_width": 48, "active": 4, "groups": 3, "groups_active": 2},
}  # fmt: skip


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with a dense model of random weights."""
    folder = tmp_path_factory.mktemp("upcycle") / "dense"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    shapes = logical_tensors(Architecture(DENSE, None, VOCAB))
    tensors = ((*key, 0.3 * torch.randn(shape, generator=generator)) for key, shape in shapes.items())
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": DENSE.model_dump(mode="json")}))
    write_whole(folder / "checkpoints", 0, tensors, {"optimizer_steps": 0, "vocab": VOCAB, "special": {}})
    return folder


def upcycle(source: Path, target: Path, groups: Any, moe: dict[str, Any], to: str = "moescale", **more: Any) -> Any:
    from moescale.checkpoint.convert.convert import convert

    return convert(source, target, to, upcycling=Upcycling(MoEConfig(**moe), **more), groups=groups)


def tensors_of(folder: Path) -> Any:
    from moescale.checkpoint.convert.run_folder import RunFolder

    return RunFolder().open(folder, None)


@pytest.mark.parametrize("case", CASES)
def test_the_mixture_computes_what_the_dense_model_did(case: str, dense: Path, one_rank: Any, tmp_path: Path) -> None:
    ledger = upcycle(dense, tmp_path / "mixture", one_rank, CASES[case])
    assert ledger.logits["compared"]
    assert ledger.logits["largest_difference"] <= 1e-5 * ledger.logits["largest"]


@pytest.mark.parametrize(("to", "moe"), [("hf-mixtral", COPIES), ("megatron", CASES["slices"])])
def test_any_format_can_be_the_target(to: str, moe: dict[str, Any], dense: Path, one_rank: Any, tmp_path: Path) -> None:
    if to.startswith("hf"):
        pytest.importorskip("transformers")
    ledger = upcycle(dense, tmp_path / "mixture", one_rank, moe, to)
    assert ledger.logits["largest_difference"] <= 1e-5 * ledger.logits["largest"]


def test_experts_are_slices_that_make_the_dense_layer_whole(dense: Path, one_rank: Any, tmp_path: Path) -> None:
    upcycle(dense, tmp_path / "mixture", one_rank, CASES["slices"])
    before, after = tensors_of(dense), tensors_of(tmp_path / "mixture")

    def joined(kind: str, dim: int) -> Tensor:
        return torch.cat([after.whole("master", f"layers.1.moe.experts.{j}.{kind}") for j in (3, 4, 5)], dim)

    for kind, dim, scale in (("gate", 0, 1), ("up", 0, 1), ("down", 1, 3)):
        assert torch.equal(joined(kind, dim), scale * before.whole("master", f"layers.1.ffn.{kind}"))
    router = after.whole("master", "layers.1.moe.router").view(2, 3, 32)
    assert torch.equal(router[:, 0], router[:, 2])
    assert not torch.equal(router[0], router[1])


def test_every_dense_tensor_is_accounted_for(dense: Path, one_rank: Any, tmp_path: Path) -> None:
    ledger = upcycle(dense, tmp_path / "mixture", one_rank, CASES["slices of several copies"])
    gate = next(entry for entry in ledger.entries if entry.name == "master/layers.2.ffn.gate")
    assert gate.targets == tuple(f"master/layers.2.moe.experts.{j}.gate" for j in range(24))
    assert {entry.fate for entry in ledger.entries} == {"converted"}


def test_noise_tells_experts_apart_by_as_much_as_it_says(dense: Path, one_rank: Any, tmp_path: Path) -> None:
    ledger = upcycle(dense, tmp_path / "mixture", one_rank, COPIES, noise=0.1, seed=3)
    assert not ledger.logits["compared"]
    before, after = tensors_of(dense), tensors_of(tmp_path / "mixture")
    whole = before.whole("master", "layers.0.ffn.up")
    added = [after.whole("master", f"layers.0.moe.experts.{j}.up") - whole for j in range(2)]
    for noise in added:
        assert noise.std().item() == pytest.approx(0.1 * whole.std().item(), rel=0.1)
    assert abs(torch.corrcoef(torch.stack([n.flatten() for n in added]))[0, 1]) < 0.1


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"expert_width": 40}, r"moe\.expert_width \(40\) must divide model\.ffn \(96\)"),
        ({"expert_width": 32, "experts": 8}, r"moe\.experts \(8\) must be a multiple of .*\(3\)"),
        ({"expert_width": 48, "active": 3}, r"moe\.active \(3\) must be a multiple of .*\(2\)"),
        ({"shared": 1}, r"moe\.shared \(1\)"),
        ({"score": "softmax"}, r"moe\.score \(softmax\): the weights of a token's experts do not sum to 1"),
        ({"capacity": 2.0}, r"moe\.capacity \(2\.0\)"),
        ({"router": "expert_choice", "score": "softmax_normalized"}, r"moe\.router \(expert_choice\)"),
        (
            {"groups": 3, "expert_width": 32, "groups_active": 3, "active": 3},
            r"moe\.groups \(3\) of moe\.experts \(6\)",
        ),
    ],
)
def test_what_would_not_compute_the_same_is_refused(
    changes: dict[str, Any], complaint: str, dense: Path, one_rank: Any, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=complaint):
        upcycle(dense, tmp_path / "mixture", one_rank, {**COPIES, **changes})
    assert not (tmp_path / "mixture").exists()


def test_a_mixture_is_not_upcycled(dense: Path, one_rank: Any, tmp_path: Path) -> None:
    upcycle(dense, tmp_path / "mixture", one_rank, COPIES)
    with pytest.raises(UserError, match="is a mixture already"):
        upcycle(tmp_path / "mixture", tmp_path / "again", one_rank, COPIES)


def test_a_run_file_says_what_to_become(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"moe": COPIES, "training": {"seed": 7}}))
    assert load_upcycling(tmp_path / "run.yaml", 0.5) == Upcycling(MoEConfig(**COPIES), 0.5, 7)
    (tmp_path / "run.yaml").write_text("model: {}\n")
    with pytest.raises(UserError, match="has no moe section"):
        load_upcycling(tmp_path / "run.yaml")


@pytest.mark.slow
def test_a_run_goes_on_as_a_mixture_from_where_the_dense_one_was(tmp_path: Path) -> None:
    """By the command line, as the docs have it: the evaluation loss does not jump."""
    for number in range(20):
        words = [f"word{number * k * k % 37} and {k}" for k in range(300)]
        (tmp_path / f"{number:02d}.txt").write_text("\n".join(words))
    content: dict[str, Any] = {
        "model": {"layers": 2, "width": 32, "heads": 4, "ffn": 96},
        "data": {
            "path": str(tmp_path / "prepared"),
            "domains": {"words": {"files": [str(tmp_path / "*.txt")]}},
            "tokenizer": {"vocab": 330},
            "held_out": 0.1,
            "samples": 4096,
        },
        "optimizer": {"lr": 0.01},
        "training": {"seq": 32, "batch": 8, "steps": 20},
        "eval": {"sequences": 16},
        "logging": {"tensorboard": False},
        "runtime": {"threads": 1},
    }
    mixture = {
        **{key: section for key, section in content.items() if key != "model"},
        "extends": "mixture/config.yaml",
        "optimizer": {"lr": 1e-12},
        "training": {**content["training"], "steps": 1},
    }
    (tmp_path / "dense.yaml").write_text(yaml.safe_dump(content))
    (tmp_path / "moe.yaml").write_text(yaml.safe_dump({"moe": CASES["slices"]}))
    (tmp_path / "on.yaml").write_text(yaml.safe_dump(mixture))
    for verb in (
        "train dense.yaml --out dense",
        "convert dense mixture --to moescale --upcycle moe.yaml",
        "train on.yaml --out mixture",
    ):
        command = [sys.executable, "-P", "-m", "moescale", *verb.split()]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
    before, after = (read_record(tmp_path / folder).evals[-1]["loss"] for folder in ("dense", "mixture"))
    assert before < 5
    assert after == pytest.approx(before, rel=1e-5)
