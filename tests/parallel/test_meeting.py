"""The address at which ranks first meet. Names are those of faults that other projects met."""

import datetime
import socket
import subprocess
import sys
import threading

import pytest
import torch.distributed as dist

from moescale.base.errors import UserError
from moescale.parallel.failure import LostRank, Patience
from moescale.parallel.launchers import Place, Start, find_start
from moescale.parallel.meeting import meet, reachable_from_all

SPREAD = Start("torchrun", Place(0, 4, 0, 2), 2, several_hosts=True)
TOGETHER = Start("torchrun", Place(0, 2, 0, 2), 1)


@pytest.mark.parametrize("address", ["localhost", "127.0.0.1", "127.0.1.1", "::1"])
def test_pith_train_91_no_silent_fallback_to_localhost(address: str) -> None:
    """scontrol was missing in the container, a script fell back to localhost, each node met itself."""
    with pytest.raises(UserError, match=rf"MASTER_ADDR \({address}\) is .*several hosts; set MASTER_ADDR to"):
        reachable_from_all(address, SPREAD)
    assert reachable_from_all(address, TOGETHER) == address


def test_pith_train_91_nodes_are_known_without_scontrol(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    step = {
        "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0", "SLURM_NODEID": "0",
        "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
        "SLURM_STEP_NODELIST": "no-such-node[04-05]",
    }  # fmt: skip
    start = find_start(step)
    assert start.address == "no-such-node04"
    with pytest.raises(UserError, match=r"first of SLURM_STEP_NODELIST \(no-such-node04\) has no network address"):
        reachable_from_all("no-such-node04", start)


def test_nebius_177_a_head_node_whose_name_is_its_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """``hostname --ip-address`` gave 127.0.0.1 on the head node: its hosts file had its name there."""

    def hosts_file(name: str, *_: object) -> list[tuple[object, ...]]:
        assert name == "head"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 0))]

    monkeypatch.setattr(socket, "getaddrinfo", hosts_file)
    with pytest.raises(UserError, match=r"MASTER_ADDR \(head\) is 127.0.1.1 on .*loopback line of its /etc/hosts"):
        reachable_from_all("head", SPREAD)


def test_other_numbers_of_the_loopback_net_are_meant() -> None:
    """Several slurmd on one machine, each with an address of its own."""
    assert reachable_from_all("127.0.0.11", SPREAD) == "127.0.0.11"


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> socket.socket:
    """A port that somebody else listens on, and rank 0 of two that is to serve there."""
    listener = socket.create_server(("127.0.0.1", 0))
    variables = {
        "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(listener.getsockname()[1]),
    }  # fmt: skip
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return listener


def test_a_port_in_use(taken: socket.socket) -> None:
    with pytest.raises(UserError, match=r"MASTER_PORT \(\d+\) is in use on .* by another process"):
        meet(Patience(10))
    taken.close()


def test_two_ranks_meet(taken: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    port = taken.getsockname()[1]
    taken.close()
    served = meet(Patience(10))
    assert served.address == "127.0.0.1"
    other = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=datetime.timedelta(seconds=10))
    threading.Thread(target=lambda: other.set("word", "said")).start()
    assert served.store.get("word") == b"said"


def test_nobody_there(taken: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    taken.close()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(LostRank, match=r"found nobody at 127.0.0.1 \(MASTER_ADDR\), port \d+, within 1 s"):
        meet(Patience(1.25))


_STRANGER = """
from moescale.parallel import meeting
from moescale.parallel.failure import Patience
from moescale.parallel.launchers import Place, Start
meeting._broadcast("", Start("mpirun", Place(1, 2, 1, 2), 2), Patience(5))
"""


def test_mpi4py_of_another_mpi() -> None:
    """It knows only itself, in each process of mpirun."""
    pytest.importorskip("mpi4py")
    done = subprocess.run([sys.executable, "-c", _STRANGER], capture_output=True, text=True, timeout=120)
    assert "UserError: mpirun says rank 1 of 2, mpi4py says 0 of 1" in done.stderr
