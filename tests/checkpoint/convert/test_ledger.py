"""The account itself: complete, readable, and it notices a format that loses, doubles or invents a tensor."""

import json
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from moescale.models.config import ModelConfig
from moescale.moe import MoEConfig

MODEL, MOE = ModelConfig(layers=2, width=32, heads=4, qk_norm="full"), MoEConfig(experts=3, active=2, expert_width=16)


@pytest.fixture(scope="module")
def converted(make_ours: Callable[..., Any], convert: Callable[..., Any], tmp_path_factory: Any) -> tuple[Any, Path]:
    """A ledger and the folder that holds ``ours`` and ``there``."""
    folder = tmp_path_factory.mktemp("ledger")
    make_ours(folder / "ours", MODEL, MOE)
    return convert(folder / "ours", folder / "there", "hf-olmoe"), folder


def test_it_lies_in_the_target_and_lists_everything(converted: tuple[Any, Path]) -> None:
    ledger, folder = converted
    written = json.loads((folder / "there" / "ledger.json").read_text())
    assert written == json.loads(json.dumps(ledger.as_json()))
    stored = load_file(folder / "there" / "model.safetensors")
    by_name = {entry["name"]: entry for entry in written["written"]}
    assert by_name.keys() == stored.keys()
    for name, tensor in stored.items():
        assert by_name[name]["shape"] == list(tensor.shape)
        assert by_name[name]["crc32"] == f"{zlib.crc32(tensor.numpy().tobytes()):08x}"
    assert {entry["fate"] for entry in written["tensors"]} == {"converted"}
    assert sorted(t for entry in written["tensors"] for t in entry["targets"]) == sorted(stored)
    assert {setting["fate"] for setting in written["settings"]} == {"translated", "without effect"}
    assert all(setting["why"] for setting in written["settings"] if setting["fate"] == "without effect")
    assert written["logits"]["compared"]


def test_the_table_puts_layers_and_experts_together(converted: tuple[Any, Path]) -> None:
    rows = {row[0]: row for row in converted[0].rows()}
    assert rows["master/layers.*.moe.experts.*.gate"] == (
        "master/layers.*.moe.experts.*.gate",
        "6",
        "F32 16x32",
        "converted",
        "model.layers.*.mlp.experts.*.gate_proj.weight",
    )
    assert sum(int(row[1]) for row in rows.values()) == len(converted[0].entries)


def test_a_format_that_errs_is_found_out(converted: tuple[Any, Path]) -> None:
    from moescale.checkpoint.convert.convert import FORMATS
    from moescale.checkpoint.convert.ledger import check_target

    ledger, folder = converted
    ours, olmoe = (next(f for f in FORMATS if f.name == name) for name in ("moescale", "hf-olmoe"))
    source, reopened = ours.open(folder / "ours", None), olmoe.open(folder / "there", None)
    check_target(ledger.targets, source, reopened)
    lost = [t for t in ledger.targets if "experts.1.up" not in t.name]
    with pytest.raises(RuntimeError, match=r"master/layers\.0\.moe\.experts\.1\.up \(0 times\)"):
        check_target(lost, source, reopened)
    with pytest.raises(RuntimeError, match=r"master/embedding \(2 times\)"):
        check_target([*ledger.targets, ledger.targets[0]], source, reopened)
    invented = replace(ledger.targets[0], name="model.more.weight", logical=(), why="because")
    with pytest.raises(RuntimeError, match=r"files differ from what was written: model\.more\.weight"):
        check_target([*ledger.targets, invented], source, reopened)
    silent = [replace(ledger.targets[0], logical=(("master", "more"),)), *ledger.targets[1:]]
    with pytest.raises(RuntimeError, match=r"master/embedding \(0 times\), master/more"):
        check_target(silent, source, reopened)
