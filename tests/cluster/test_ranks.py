"""Ranks that srun starts; and ``doctor --cluster`` over hosts."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from slurm_cluster import SlurmCluster

from moescale.parallel.slurm_names import expand_hosts
from moescale.scaling.record import read_record

pytestmark = pytest.mark.distributed
MOESCALE = (sys.executable, "-m", "moescale")
LISTS = ("node1", "node[1-3]", "node[08-10],login", "r[1-2]n[0-1],b2", "gpu-a,gpu-b[001,003-004]")


def srun(slurm: SlurmCluster, *command: str) -> subprocess.CompletedProcess[str]:
    """A step of two nodes with a task each."""
    step = ["srun", "--quiet", "--mpi=none", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1"]
    environment = {**slurm.environment, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*step, *command], env=environment, capture_output=True, text=True, timeout=240, stdin=subprocess.DEVNULL
    )


def test_srun_gives_ranks(slurm: SlurmCluster, tmp_path: Path) -> None:
    """Names of nodes are no host names here, so rank 0 is found at the address that Slurm has for its node."""
    done = srun(slurm, *MOESCALE, "doctor", "--cluster", "--json", "--out", str(tmp_path))
    found = json.loads(done.stdout)
    assert [(report["rank"], report["launcher"], report["local_world"]) for report in found["reports"]] == [
        (0, "srun", 1), (1, "srun", 1),
    ]  # fmt: skip
    assert len(found["links"]) == 1, found["faults"]

    by_hand = {
        "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "localhost",
        "MASTER_PORT": "29500",
    }  # fmt: skip
    alone = [f"{name}={value}" for name, value in by_hand.items()]
    refused = srun(slurm, "env", *alone, *MOESCALE, "train", "absent.yaml", "--out", str(tmp_path / "out"))
    assert refused.returncode == 2
    assert "WORLD_SIZE (1) says that there are fewer ranks than the 2 tasks of srun" in refused.stderr

    for text in LISTS:
        assert slurm.ask("scontrol", "show", "hostnames", text).stdout.split() == expand_hosts(text)


@pytest.mark.slow
def test_a_run_under_srun_is_that_of_one_process(
    slurm: SlurmCluster, run_section: dict[str, Any], tmp_path: Path
) -> None:
    files = {"alone": run_section, "spread": {**run_section, "parallel": {"expert": 2}}}
    for name, content in files.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    alone, spread = (["train", str(tmp_path / f"{name}.yaml"), "--out", str(tmp_path / name)] for name in files)
    subprocess.run([*MOESCALE, *alone], check=True, timeout=240)
    done = srun(slurm, *MOESCALE, *spread)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = read_record(tmp_path / "alone"), read_record(tmp_path / "spread")
    assert two.headers[0]["topology"]["expert"] == 2
    assert [line["loss"] for line in two.steps] == pytest.approx([line["loss"] for line in one.steps], rel=1e-5)


def doctor_on(hosts: list[Any], out: Path, logs: list[Path]) -> list[int]:
    """``doctor --cluster`` under torchrun on both hosts, one rank each; exit codes of torchrun."""
    processes = [
        host.start(
            [
                *(sys.executable, "-m", "torch.distributed.run"),
                *("--nnodes", "2", "--node-rank", str(number), "--nproc-per-node", "1"),
                *("--master-addr", hosts[0].name, "--master-port", "29500"),
                *("--module", "moescale", "doctor", "--cluster", "--out", str(out)),
            ],
            logs[number],
        )
        for number, host in enumerate(hosts)
    ]
    return [process.wait(timeout=240) for process in processes]


@pytest.mark.slow
def test_doctor_over_two_hosts(hosts: list[Any], tmp_path: Path) -> None:
    logs = [tmp_path / "a.log", tmp_path / "b.log"]
    assert doctor_on(hosts, tmp_path, logs) == [0, 0], logs[0].read_text()
    told = logs[0].read_text()
    for word in ("node-a", "node-b", "10.77.0.1", "10.77.0.2", "eth0", "rank 1 on node-b", "/s", "nothing is wrong"):
        assert word in told, told


@pytest.mark.slow
def test_a_host_whose_name_is_its_loopback(hosts: list[Any], tmp_path: Path) -> None:
    """On the head node it ends at once, whatever the other hosts' files say."""
    (tmp_path / "hosts").write_text(f"127.0.1.1 {hosts[0].name}\n{hosts[1].address} {hosts[1].name}\n")
    logs = [tmp_path / "a.log", tmp_path / "b.log"]
    (hosts[0].start([sys.executable, "-c", _HEAD], logs[0])).wait(timeout=60)
    assert "MASTER_ADDR (node-a) is 127.0.1.1 on node-a, by which every host means itself" in logs[0].read_text()


_HEAD = """
from moescale.parallel.launchers import Place, Start
from moescale.parallel.meeting import reachable_from_all
reachable_from_all("node-a", Start("torchrun", Place(0, 2, 0, 1), 2, several_hosts=True))
"""
