"""The verb: what it prints, its exit codes, and what it says where transformers is missing."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moescale.base.errors import UserError
from moescale.launch.cli import app

_TWICE = """
import sys
sys.modules["transformers"] = None  # as if it were not installed
from moescale.launch.cli import main
arguments = sys.argv
for more in ([], ["--no-check"]):
    sys.argv = [*arguments, *more]
    try:
        main()
    except SystemExit as end:
        print("exit", end.code, flush=True)
"""


def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_it_is_a_verb() -> None:
    assert "convert" in {command.name for command in app.registered_commands}


def test_json(mixtral: Any, tmp_path: Path) -> None:
    """In a process of its own, which makes its own world; stdout holds the ledger and nothing else."""
    code = "from moescale.launch.cli import main\nmain()"
    done = run(code, "convert", mixtral.folder, tmp_path / "ours", "--to", "moescale", "--json")
    assert done.returncode == 0, done.stderr
    ledger = json.loads(done.stdout)
    assert ledger == json.loads((tmp_path / "ours" / "ledger.json").read_text())
    assert ledger["logits"]["compared"]


def test_the_table(
    mixtral: Any, convert: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from moescale.launch.cli_convert import show

    show(convert(mixtral.folder, tmp_path / "ours", "moescale"))
    said = capsys.readouterr()
    assert "model.layers.*.block_sparse_moe.experts.*.w1.weight" in said.out
    assert "53 tensors converted, 0 left out, none lost; logits agree to" in said.out
    assert "router_jitter_noise (acts in training only)" in said.out
    assert "no tokenizer file" not in said.err


def test_without_transformers(mixtral: Any, tmp_path: Path) -> None:
    done = run(_TWICE, "convert", mixtral.folder, tmp_path / "ours", "--to", "moescale")
    assert done.stderr.startswith("error: comparing logits needs transformers, which is not installed")
    assert "Traceback" not in done.stderr
    assert done.stdout.startswith("exit 2\n")
    assert "logits were not compared (--no-check)" in done.stdout
    assert done.stdout.endswith("exit 0\n")
    assert (tmp_path / "ours" / "ledger.json").is_file()


def test_a_configuration_that_is_not_asked_for(mixtral: Any, convert: Callable[..., Any], tmp_path: Path) -> None:
    from moescale.checkpoint.convert.run_folder import given_architecture

    path = tmp_path / "run.yaml"
    path.write_text("model: {layers: 2, width: 32, heads: 4}\ndata: {domains: {a: {source: stdlib}}}\n")
    given = given_architecture(path)
    assert (given.model.width, given.vocab) == (32, 1024)
    with pytest.raises(UserError, match=r"\(hf-mixtral\) holds its own configuration; leave it out"):
        convert(mixtral.folder, tmp_path / "ours", "moescale", given=given)
    path.write_text("model: {layers: 2, width: 32, heads: 4}\n")
    assert given_architecture(path).vocab == 0  # the source must tell it
    path.write_text("moe: {}\n")
    with pytest.raises(UserError, match=r"run\.yaml: has no model section"):
        given_architecture(path)
