"""The step model beside steps measured here: real runs on one core and on two, with the shipped figures of a core.

pytest -m slow -s tests/launch/test_measured_steps.py      prints the table of docs/planning.md
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moescale.launch.cluster_config import load_cluster
from moescale.models.cost.step import StepModel
from moescale.training.budget import workload
from moescale.training.config import load_run

STEPS = 30
DENSE: dict[str, str] = {"model.shape": "d128", "training.batch": "8"}
MIXTURE = {**DENSE, "moe": "{experts: 8, active: 2, granularity: 2}"}
FINE = {**DENSE, "moe": "{experts: 32, active: 8, granularity: 8}"}
CASES: list[tuple[str, int, dict[str, str]]] = [
    ("dense d64", 1, {**DENSE, "model.shape": "d64"}),
    ("dense d128", 1, DENSE),
    ("dense d256", 1, {**DENSE, "model.shape": "d256"}),
    ("8 experts, top-2", 1, MIXTURE),
    ("32 experts, top-8", 1, FINE),
    ("8 experts, top-2, bf16", 1, {**MIXTURE, "training.dtype": "bf16"}),
    ("8 experts, top-2, recomputed", 1, {**MIXTURE, "training.recompute": "full"}),
    ("dense, DP2", 2, DENSE),
    ("dense, TP2", 2, {**DENSE, "parallel.tensor": "2"}),
    ("dense, PP2", 2, {**DENSE, "parallel.pipeline": "2", "training.micro_batch": "2"}),
    ("8 experts, EP2", 2, {**MIXTURE, "parallel.expert": "2"}),
    ("32 experts, EP2", 2, {**FINE, "parallel.expert": "2"}),
]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(("name", "world", "keys"), CASES, ids=[name for name, _, _ in CASES])
def test_a_step_takes_about_as_long_as_expected(
    name: str, world: int, keys: dict[str, str], work: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    overrides = [
        f"{key}={value}" for key, value in {**keys, "training.seq": "256", "training.steps": str(STEPS)}.items()
    ]
    command = [str(word) for word in ("train", work / "base.yaml", "--out", tmp_path, *overrides)]
    start = ["-m", "torch.distributed.run", f"--nproc-per-node={world}"] if world > 1 else []
    done = subprocess.run(
        [sys.executable, *start, "-m", "moescale", *command],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines: list[dict[str, Any]] = [json.loads(line) for line in (tmp_path / "record.jsonl").read_text().splitlines()]
    measured = min(line["seconds"] for line in lines if line["kind"] == "step")  # other work slows the rest

    config = load_run(work / "base.yaml", overrides)
    hardware = load_cluster(Path("clusters/cpu.yaml")).hardware
    assert hardware is not None
    topology = config.check_layout(world, world)
    step = StepModel(config.model, config.moe, 512, hardware).time(workload(config, 512, topology), topology)
    error = step.seconds / measured - 1
    print(f"\n| {name} | {measured:.3f} | {step.seconds:.3f} | {error:+.0%} | {step.bound} |")
    assert 1 / 3 < step.seconds / measured < 3
