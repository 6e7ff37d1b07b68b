"""The README's commands, executed as they stand, in the order they stand in."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Whole suites and installations: make study and make test are what calls this test.
NOT_HERE = ("make ", "pip ", "DS_BUILD_OPS=0 pip ")


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like the checkout to the commands, and keeps what they write."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "constraints.txt").symlink_to(ROOT / "constraints.txt")
    return folder


def test_the_readme_has_the_commands_that_matter() -> None:
    found = " ".join(commands())
    for verb in ("make study", "make test", "make smoke", "moescale train", "moescale study run", "torchrun"):
        assert verb in found


@pytest.mark.parametrize(("target", "does"), [("study", "study run"), ("test", "-m pytest"), ("smoke", "smoke.yaml")])
def test_make_targets_exist(target: str, does: str) -> None:
    planned = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=False)
    assert planned.returncode == 0, planned.stderr
    assert does in planned.stdout


@pytest.mark.distributed
@pytest.mark.parametrize("command", [c for c in commands() if not c.startswith(NOT_HERE)])
def test_a_command_works(command: str, place: Path) -> None:
    words = shlex.split(command)
    tool, rest = words[0], words[1:]
    module = {"moescale": ["moescale"], "torchrun": ["torch.distributed.run"]}[tool]
    result = subprocess.run(
        [sys.executable, "-m", *module, *rest],
        cwd=place,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Traceback" not in result.stderr
