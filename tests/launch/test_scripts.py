"""The batch scripts: Slurm would read their directives, and without Slurm they run as they are."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

import moescale

SCRIPTS = Path(moescale.__file__).parent / "launch" / "scripts"
DENSE = {"layers": 2, "width": 32, "heads": 2, "ffn": 64}
MOE = {"experts": 8, "active": 4, "expert_width": 32, "score": "softmax_normalized"}

Bash = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def bash(tmp_path: Path) -> Bash:
    """Run a script with this package as ``moescale``, in a folder of its own and without Slurm."""
    command = tmp_path / "bin" / "moescale"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -P -m moescale "$@"\n')
    command.chmod(0o755)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    environment["PATH"] = f"{command.parent}:{environment['PATH']}"

    def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", str(SCRIPTS / script), *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    return run


def dense_run(folder: Path) -> None:
    from moescale.checkpoint.convert.formats import Architecture, logical_tensors
    from moescale.checkpoint.storage import write_whole
    from moescale.models.config import ModelConfig

    shapes = logical_tensors(Architecture(ModelConfig(**DENSE), None, 100))
    generator = torch.Generator().manual_seed(0)
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": DENSE}))
    tensors = ((*key, 0.3 * torch.randn(shape, generator=generator)) for key, shape in shapes.items())
    write_whole(folder / "checkpoints", 0, tensors, {"optimizer_steps": 0, "vocab": 100, "special": {}})


@pytest.mark.parametrize("script", sorted(path.name for path in SCRIPTS.iterdir()))
def test_a_script_is_bash_says_how_to_call_it_and_asks_for_one_task(script: str, bash: Bash) -> None:
    text = (SCRIPTS / script).read_text()
    assert subprocess.run(["bash", "-n", str(SCRIPTS / script)]).returncode == 0
    assert f"sbatch launch/scripts/{script} " in text
    directives = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    assert all(re.fullmatch(r"#SBATCH --[a-z-]+=\S+", line) for line in directives)
    assert "#SBATCH --ntasks=1" in directives
    assert text.index(directives[-1]) < text.index("set -euo pipefail")  # sbatch stops at the first command
    without = bash(script)
    assert without.returncode != 0
    assert "folder" in without.stderr


@pytest.mark.slow
def test_the_scripts_take_a_run_out_in_and_into_a_mixture(bash: Bash, tmp_path: Path) -> None:
    dense_run(tmp_path / "dense")
    (tmp_path / "moe.yaml").write_text(yaml.safe_dump({"moe": MOE}))
    for call in (
        ("export.sbatch", "dense", "exported", "megatron", "fp32"),
        ("import.sbatch", "exported", "imported"),
        ("upcycle.sbatch", "imported", "mixture", "moe.yaml"),
    ):
        done = bash(*call)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / call[2] / "ledger.json").is_file()
