"""The verb: what it prints, its exit codes, and what it says where transformers is missing."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from moescale.launch.cli import app


def run(*arguments: object, without: str = "") -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, where the package ``without`` cannot be imported."""
    code = "import sys\n" + (f"sys.modules[{without!r}] = None\n" if without else "")
    code += "from moescale.launch.cli import main\nmain()"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_it_is_a_verb() -> None:
    assert "convert" in {command.name for command in app.registered_commands}


def test_json_and_table(mixtral: Any, tmp_path: Path) -> None:
    """One process for each direction, both with their own worlds."""
    there = run("convert", mixtral.folder, tmp_path / "ours", "--to", "moescale", "--json")
    assert there.returncode == 0, there.stderr
    ledger = json.loads(there.stdout)
    assert ledger == json.loads((tmp_path / "ours" / "ledger.json").read_text())
    assert ledger["logits"]["compared"]
    back = run("convert", tmp_path / "ours", tmp_path / "back", "--to", "hf-mixtral", "--dtype", "bf16")
    assert back.returncode == 0, back.stderr
    for words in ("model.layers.*.block_sparse_moe.experts.*.w1.weight", "53 tensors converted, 0 left out, none lost"):
        assert words in back.stdout
    assert "logits agree to" in back.stdout


def test_without_transformers(mixtral: Any, tmp_path: Path) -> None:
    said = run("convert", mixtral.folder, tmp_path / "ours", "--to", "moescale", without="transformers")
    assert said.returncode == 2
    assert said.stderr.startswith("error: comparing logits needs transformers, which is not installed")
    assert "Traceback" not in said.stderr
    assert not (tmp_path / "ours").exists()
    unchecked = run(
        "convert", mixtral.folder, tmp_path / "ours", "--to", "moescale", "--no-check", without="transformers"
    )
    assert unchecked.returncode == 0, unchecked.stderr
    assert "logits were not compared (--no-check)" in unchecked.stdout
    assert "given" not in unchecked.stdout


def test_a_configuration_that_is_not_asked_for(mixtral: Any, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        "model: {layers: 2, width: 32, heads: 4}\ndata: {domains: {a: {source: stdlib}}}\n"
    )
    said = run("convert", mixtral.folder, tmp_path / "ours", "--to", "moescale", "--config", tmp_path / "run.yaml")
    assert said.returncode == 2
    assert "(hf-mixtral) holds its own configuration; leave it out" in said.stderr
