"""One real step of the shipped 1.5-billion-parameter mixture: 15 GB of memory and some minutes."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from moescale.base.config import SHIPPED
from moescale.launch.environment import ALLOCATOR
from moescale.scaling.record import read_record

NEEDED = 16 << 30


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_step_of_a_large_mixture_takes_the_memory_that_was_planned(here: Path, tmp_path: Path) -> None:
    available = psutil.virtual_memory().available
    if available < NEEDED:
        pytest.skip(f"needs {NEEDED >> 30} GiB of free memory; {available >> 30} are free")
    run = SHIPPED / "runs" / "moe-1.5b.yaml"
    command = [sys.executable, str(here / "large_step_worker.py"), str(run), str(tmp_path), f"data.path={tmp_path}"]
    environment = {**os.environ, **ALLOCATOR, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    memory, (alone, spread) = map(json.loads, done.stdout.splitlines()[-2:])

    (step,) = read_record(tmp_path).steps
    assert step["step"] == 1
    assert step["loss"] == pytest.approx(math.log(1024), rel=0.2)
    assert len(step["router"]) == 28
    assert step["memory_bytes"] > 12e9
    assert memory["planned"] == pytest.approx(memory["measured"], rel=0.1)

    assert alone["faults"] == spread["faults"] == []
    assert alone["memory_bytes"] == memory["planned"]
    assert alone["parameters"] == alone["parameters_held"] == spread["parameters"] > 1.5e9
    assert spread["parameters_held"] < alone["parameters_held"] / 8
