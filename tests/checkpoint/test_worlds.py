"""Runs the tests of worlds/ in a process that is in no world."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "worlds"
FILES = sorted(path.name for path in FOLDER.glob("test_*.py"))


def run(name: str, which: str) -> None:
    command = [sys.executable, "-m", "pytest", str(FOLDER / name), "-m", which, "-p", "no:warnings"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=900, env={**os.environ, "MOESCALE_WORLDS": "1"}
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize("name", FILES)
def test_worlds_of_many_sizes(name: str) -> None:
    run(name, "not slow")


@pytest.mark.slow
def test_every_pair_of_layouts() -> None:
    run("test_resharding.py", "slow")
