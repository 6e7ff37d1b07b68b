"""Starting again with the allocator's settings."""

import json
import subprocess
import sys

import pytest

from moescale.launch.environment import ALLOCATOR, cuda_devices
from moescale.launch.pool import Child, _freest

SCRIPT = """
import json, os, sys
from moescale.launch.environment import restart_with_allocator_settings
print(os.getpid())
restart_with_allocator_settings()
settings = {k: v for k, v in os.environ.items() if k.startswith(("MALLOC_", "GLIBC_"))}
print(json.dumps([os.getpid(), sys.argv[1:], settings]))
"""


@pytest.mark.skipif(bool(cuda_devices()), reason="only processes that compute on the CPU are started again")
def test_restart_keeps_process_arguments_and_choices(environment):
    bare = {key: value for key, value in environment.items() if key not in ALLOCATOR}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, "a b", "k=v"],
        capture_output=True, text=True, check=True, env={**bare, "MALLOC_TOP_PAD_": "1024"},
    )  # fmt: skip
    first, second, last = result.stdout.splitlines()
    assert first == second
    assert json.loads(last) == [int(first), ["a b", "k=v"], {**ALLOCATOR, "MALLOC_TOP_PAD_": "1024"}]


def test_a_device_is_given_to_as_few_runs_as_can_be(tmp_path):
    def child(device):
        return Child(None, None, tmp_path, 0, device)

    assert _freest([], []) is None
    assert _freest(["0", "1"], []) == "0"
    assert _freest(["0", "1"], [child("0")]) == "1"
    assert _freest(["0", "1"], [child("0"), child("1"), child("0")]) == "1"
    assert _freest(["GPU-5f"], [child("GPU-5f")]) == "GPU-5f"


@pytest.mark.parametrize(
    ("visible", "devices"),
    [
        (None, ["0", "2", "10"]),
        ("", []),
        ("-1", []),
        ("2,0", ["2", "0"]),
        ("1,-1,3", ["1"]),
        ("GPU-5f", ["GPU-5f"]),
    ],
)
def test_devices_are_those_that_cuda_will_see(visible, devices, monkeypatch, tmp_path):
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert cuda_devices(tmp_path) == []  # no driver
    for name in ("nvidiactl", "nvidia-uvm", "nvidia0", "nvidia10", "nvidia2"):
        (tmp_path / name).touch()
    assert cuda_devices(tmp_path) == devices
