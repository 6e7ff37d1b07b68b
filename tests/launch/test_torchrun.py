"""A mixture of the quickstart under torchrun follows the loss curve of a single process, step by step."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from moescale.launch.expansion import expand
from moescale.launch.study_config import load_study

STEPS = 200
QUICKSTART = Path(__file__).parents[2] / "configs" / "studies" / "quickstart.yaml"


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "record.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "step"]


def train(ranks: int, run: Path, out: Path, *overrides: str) -> list[float]:
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *start, "-m", "moescale", "train", str(run), *overrides, "--out", str(out)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=900, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return losses(out)


@pytest.fixture(scope="module")
def quickstart_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a mixture of the study, cut to its first steps."""
    runs = {run.name: run for run in expand(load_study(QUICKSTART)).runs}
    config = next(run.config for name, run in runs.items() if run.family == "E8G4" and "d48" in name)
    content = config.model_dump(mode="json")
    content["training"] |= {"flops": None, "tokens": None, "steps": STEPS}
    path = tmp_path_factory.mktemp("torchrun") / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def alone(quickstart_run: Path) -> list[float]:
    return train(1, quickstart_run, quickstart_run.parent / "alone")


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("axis", ["expert", "tensor", "pipeline"])
def test_two_ranks_follow_one(axis: str, quickstart_run: Path, alone: list[float]) -> None:
    spread = train(2, quickstart_run, quickstart_run.parent / axis, f"parallel.{axis}=2", "training.micro_batch=1")
    assert len(spread) == len(alone) == STEPS
    worst = max(abs(two - one) for one, two in zip(alone, spread, strict=True))
    assert worst <= 1e-4, f"parallel.{axis}=2 leaves the curve by {worst:.1e}"
