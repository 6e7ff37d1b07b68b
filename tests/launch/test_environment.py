"""Starting again with the allocator's settings."""

import json
import subprocess
import sys

import pytest

from moescale.launch.environment import ALLOCATOR, has_cuda_device

SCRIPT = """
import json, os, sys
from moescale.launch.environment import restart_with_allocator_settings
print(os.getpid())
restart_with_allocator_settings()
settings = {k: v for k, v in os.environ.items() if k.startswith(("MALLOC_", "GLIBC_"))}
print(json.dumps([os.getpid(), sys.argv[1:], settings]))
"""


@pytest.mark.skipif(has_cuda_device(), reason="only processes that compute on the CPU are started again")
def test_restart_keeps_process_arguments_and_choices(environment):
    bare = {key: value for key, value in environment.items() if key not in ALLOCATOR}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, "a b", "k=v"],
        capture_output=True, text=True, check=True, env={**bare, "MALLOC_TOP_PAD_": "1024"},
    )  # fmt: skip
    first, second, last = result.stdout.splitlines()
    assert first == second
    assert json.loads(last) == [int(first), ["a b", "k=v"], {**ALLOCATOR, "MALLOC_TOP_PAD_": "1024"}]
