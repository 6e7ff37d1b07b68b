"""The CUDA stand-in: nothing happens on import, and no replacement is superfluous."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA the stand-in is never installed")


@pytest.fixture(scope="module")
def probed() -> dict[str, Any]:
    """What standin_probe.py found; it asserts itself that importing the module changes nothing."""
    script = Path(__file__).with_name("standin_probe.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_originals_raise_without_cuda(probed: dict[str, Any]) -> None:
    assert all(probed["untouched"].values()), probed["untouched"]


def test_install_replaces_everything_and_can_be_called_twice(probed: dict[str, Any]) -> None:
    assert probed["installed"] is True
    assert probed["not replaced"] == []


def test_a_training_step_works(probed: dict[str, Any]) -> None:
    assert probed["whole"] is None
    assert probed["again"] is None


def test_each_replacement_is_needed(probed: dict[str, Any]) -> None:
    # Pipeline and tensor-parallel communication allocate on the current device: one rank alone does without.
    superfluous = [name for name, failure in probed["without"].items() if failure is None and name != "current_device"]
    assert superfluous == [], "a training step works without these: delete them"
    assert len(probed["without"]) == 9
