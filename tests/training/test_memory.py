"""Plans of memory hold for runs above a gigabyte."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from moescale.launch.environment import ALLOCATOR

MIXTURE = {"experts": 8, "active": 2, "granularity": 2}
LATENT = {"q_rank": 192, "kv_rank": 128, "nope_dim": 64, "rope_dim": 32, "value_dim": 64}


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"layers": 8, "width": 512, "heads": 8, "kv_heads": 8, "ffn": 2048}, "training": {"batch": 4}},
        {"model": {"layers": 6, "width": 256, "heads": 4, "ffn": 1024}, "moe": MIXTURE, "training": {"batch": 32}},
        {
            "model": {"layers": 8, "width": 512, "heads": 8, "kv_heads": 8, "ffn": 1024, "mla": LATENT},
            "training": {"batch": 12},
        },
    ],
    ids=["dense", "moe", "latent"],
)
def test_planned_memory_is_within_a_tenth(changes: dict[str, Any], small_run: Any, here: Path, tmp_path: Path) -> None:
    training = {**changes["training"], "seq": 256, "steps": 3}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(small_run(**{**changes, "training": training})))
    command = [sys.executable, str(here / "memory_worker.py"), str(tmp_path / "run.yaml"), str(tmp_path / "out")]
    environment = {**os.environ, **ALLOCATOR, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    planned, measured = json.loads(result.stdout.splitlines()[-1])
    assert measured > 1e9
    assert planned == pytest.approx(measured, rel=0.1)
