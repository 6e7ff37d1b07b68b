"""``doctor --cluster``: what it finds wrong, and a world that has nothing wrong."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from moescale.launch.cluster_doctor import first_ranks, neighbours
from moescale.launch.cluster_faults import Fault, find_faults
from moescale.launch.cluster_network import Clock, Link
from moescale.launch.cluster_report import Report, _absent, existing

GOOD = Report(
    rank=0, host="a", local_world=1, launcher="srun", cores=(0, 1), threads=2, devices=(), addresses=("10.0.0.1",),
    address="10.0.0.1", interface="eth0", settings={}, absent=(), memory=8 << 30, shared_memory=4 << 30,
    folders={"/runs": 100 << 30}, facts={"version of torch": "2.13.0"},
)  # fmt: skip
B = replace(GOOD, rank=1, host="b", addresses=("10.0.0.2",), address="10.0.0.2")
FAST = Link(0, 1, 1e9, 1e-4)


def faults(*reports: Report, links: list[Link] | None = None, clocks: list[Clock] | None = None) -> list[Fault]:
    return find_faults(reports or (GOOD, B), [FAST] if links is None else links, clocks or [], {}, [])


def test_nothing_is_wrong() -> None:
    assert faults(clocks=[Clock(1, 0.9, 0.001), Clock(1, -3.0, 2.5)]) == []  # the second one may well be right


WRONG = {
    "versions": (replace(B, facts={"version of torch": "2.14.0"}), "rank 1 on b", '"2.14.0", rank 0 has "2.13.0"'),
    "launchers": (replace(B, launcher="torchrun"), "rank 1 on b", "started by torchrun, rank 0 by srun"),
    "devices": (replace(B, devices=("H100",)), "rank 1 on b", "devices are H100, rank 0 has none"),
    "threads": (replace(B, threads=8), "rank 1 on b", "8 threads take turns on 2 cores"),
    "own name": (replace(B, addresses=("127.0.1.1",)), "b", "its own name is 127.0.1.1"),
    "no name": (replace(B, addresses=()), "b", "its own name is no address"),
    "interface": (replace(B, absent=("GLOO_SOCKET_IFNAME=ib0",)), "b", "GLOO_SOCKET_IFNAME=ib0: no such interface"),
    "room": (replace(B, folders={"/runs": 1 << 30}), "b", "/runs: 1 GiB free"),
    "not writable": (replace(B, folders={"/runs": "/ may not be written to"}), "b", "/runs: / may not be written to"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_with_a_rank_or_host(case: str) -> None:
    report, where, what = WRONG[case]
    (fault,) = faults(GOOD, report)
    assert fault.where == where
    assert what in fault.what
    assert fault.advice


def test_an_interface_makes_up_for_the_name() -> None:
    loopback = replace(B, addresses=("127.0.1.1",), settings={"GLOO_SOCKET_IFNAME": "eth0"})
    assert faults(GOOD, loopback) == []


def test_what_ranks_of_a_host_share() -> None:
    together = [replace(GOOD, rank=rank, local_world=3, launcher="mpirun", shared_memory=64 << 20) for rank in range(3)]
    assert {fault.what for fault in faults(*together, links=[])} == {
        "3 ranks take turns on 2 cores", "/dev/shm has 64 MiB free",
    }  # fmt: skip
    few = [replace(GOOD, rank=rank, cores=(0, 1, 2), devices=("H100", "H100")) for rank in range(3)]
    assert [fault.what for fault in faults(*few, links=[])] == ["3 ranks have 2 devices"]


def test_slow_links_and_wrong_clocks() -> None:
    reports = [replace(GOOD, rank=rank, host=host) for rank, host in enumerate("abc")]
    links = [Link(0, 1, 1e9, 1e-4), Link(1, 2, 3e8, 1e-4), Link(2, 0, 1.1e9, 1e-4)]
    found = faults(*reports, links=links, clocks=[Clock(1, 61.0, 0.1), Clock(2, -1.5, 0.1)])
    assert [(fault.where, fault.what) for fault in found] == [
        ("b to c", "286 MiB/s, between other hosts 954 MiB/s"),
        ("b", "its clock is 61.0 s ahead of that of a"),
        ("c", "its clock is 1.5 s behind that of a"),
    ]
    assert [fault.where for fault in faults(links=[Link(0, 1, 1e7, 1e-4)])] == ["a to b"]


def test_ranks_that_cannot_talk_or_see() -> None:
    blind, mute = find_faults([GOOD, B], [], [], {0: "Connection refused", 1: "Connection refused"}, [1])
    assert (blind.where, blind.what) == ("rank 1 on b", "do not see what rank 0 writes to /runs")
    assert mute.where == "rank 0 on a and rank 1 on b"
    assert mute.what == "cannot talk with the others: Connection refused"
    assert "GLOO_SOCKET_IFNAME" in mute.advice


def test_which_ranks_are_measured() -> None:
    reports = [replace(GOOD, rank=rank, host=host) for rank, host in enumerate("aabbcc")]
    assert first_ranks(reports) == [0, 2, 4]
    assert neighbours([0, 2, 4]) == [(0, 2), (2, 4), (4, 0)]
    assert neighbours([0, 2]) == [(0, 2)]
    assert neighbours([0]) == [(0, 1)]


def test_interfaces_that_are_not_there() -> None:
    settings = {"GLOO_SOCKET_IFNAME": "eth0,eth", "NCCL_SOCKET_IFNAME": "eth,ib"}
    assert list(_absent(settings, ["lo", "eth0"])) == ["GLOO_SOCKET_IFNAME=eth", "NCCL_SOCKET_IFNAME=ib"]
    assert list(_absent({"NCCL_SOCKET_IFNAME": "=eth"}, ["lo", "eth0"])) == ["NCCL_SOCKET_IFNAME=eth"]
    assert list(_absent({"NCCL_SOCKET_IFNAME": "^docker"}, ["lo", "eth0"])) == []


def test_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    assert existing(tmp_path / "a" / "b") == tmp_path


def test_alone_there_is_nothing_to_compare(main) -> None:
    result = main("doctor", "--cluster")
    assert result.returncode == 2
    assert "this process is alone; start it on all hosts" in result.stderr


@pytest.mark.distributed
def test_two_ranks_under_torchrun(environment: dict[str, str], tmp_path: Path) -> None:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "moescale"]
    command = [*start, "doctor", "--cluster", "--json", "--out", str(tmp_path / "runs")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    found = json.loads(done.stdout)
    enough = len(os.sched_getaffinity(0)) > 1
    assert (done.returncode == 0) == found["ok"]
    assert found["ok"] == (not found["faults"])
    if enough and not any("free" in fault["what"] for fault in found["faults"]):
        assert found["ok"], found["faults"]
    assert [report["rank"] for report in found["reports"]] == [0, 1]
    assert found["reports"][0]["launcher"] == "torchrun"
    assert found["reports"][0]["facts"] == found["reports"][1]["facts"]
    (link,) = found["links"]
    assert (link["source"], link["target"]) == (0, 1)
    assert link["bandwidth"] > 1e6
    assert 0 < link["latency"] < 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.distributed
def test_an_interface_that_is_not_there(environment: dict[str, str], tmp_path: Path) -> None:
    """gloo cannot start then: a line of the result, not its end."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "moescale"]
    command = [*start, "doctor", "--cluster", "--json", "--out", str(tmp_path)]
    wrong = {**environment, "GLOO_SOCKET_IFNAME": "absent0"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=wrong)
    assert done.returncode == 1
    said = {fault["what"].split(":")[0] for fault in json.loads(done.stdout)["faults"]}
    assert {"GLOO_SOCKET_IFNAME=absent0", "cannot talk with the others"} <= said
