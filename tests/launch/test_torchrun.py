"""Runs under torchrun, beside a single process."""

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
LEARNING_RATE = 0.003
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
    content["training"] |= {"flops": None, "tokens": None, "steps": STEPS, "micro_batch": 1}
    path = tmp_path_factory.mktemp("torchrun") / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.slow
@pytest.mark.distributed
def test_two_pipeline_stages_are_one_process_to_the_bit(quickstart_run: Path, tmp_path: Path) -> None:
    alone = train(1, quickstart_run, tmp_path / "alone")
    assert train(2, quickstart_run, tmp_path / "spread", "parallel.pipeline=2") == alone


@pytest.mark.slow
@pytest.mark.distributed
def test_experts_and_tensors_on_two_ranks_follow_one_process(quickstart_run: Path, tmp_path: Path) -> None:
    """Sums are taken in another order, so the runs differ by rounding.

    At the study's own learning rate, .0133, such differences grow tenfold every few steps once a token visits another
    expert for them, in one process with other micro-batches too (docs/parity.md): a quarter of it learns as surely
    without that.
    """
    calm = f"optimizer.lr={LEARNING_RATE}"
    alone = train(1, quickstart_run, tmp_path / "alone", calm)
    assert alone[-1] < alone[0] - 2
    for axis in ("expert", "tensor"):
        spread = train(2, quickstart_run, tmp_path / axis, calm, f"parallel.{axis}=2")
        assert spread == pytest.approx(alone, abs=1e-4), axis


@pytest.mark.distributed
def test_a_mistake_in_the_file_is_said_once_by_rank_0(tmp_path: Path) -> None:
    run = QUICKSTART.parents[1] / "runs" / "moe.yaml"
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "moescale", "train"]
    command = [sys.executable, *start, str(run), "parallel.expert=3", "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    said = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert said == ["error: parallel.expert (3) must divide the 2 data x tensor ranks of a pipeline stage; try 1, 2"]
    assert not (tmp_path / "run").exists()
