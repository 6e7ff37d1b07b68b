"""A throw-away Slurm; and hosts on one machine: network namespaces, each with an interface into a switch.

A host has a name and a hosts file of its own. The switch has a namespace too, so the machine's own network is not
touched. A cable is cut at the switch: the host behind it notices nothing but silence, as when a network breaks.
"""

import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from slurm_cluster import INSTALL, SlurmCluster, missing

NEEDS = ("ip", "unshare", "hostname")
_ENTER = 'hostname "$0" && mount --bind "$1" /etc/hosts && shift && exec "$@"'


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


class Host:
    """One host: its address, and the processes started on it."""

    def __init__(self, namespace: str, switch: str, number: int, hosts_file: Path):
        self.namespace, self.name, self.address = namespace, f"node-{'ab'[number]}", f"10.77.0.{number + 1}"
        self._switch, self._port, self._hosts_file = switch, f"p{number}", hosts_file
        ip("netns", "add", namespace)
        ip("-n", namespace, "link", "set", "lo", "up")
        ip("-n", switch, "link", "add", self._port, "type", "veth", "peer", "name", "eth0", "netns", namespace)
        ip("-n", switch, "link", "set", self._port, "master", "br0", "up")
        ip("-n", namespace, "addr", "add", f"{self.address}/24", "dev", "eth0")
        ip("-n", namespace, "link", "set", "eth0", "up")

    def start(self, command: list[str], log: Path) -> subprocess.Popen[bytes]:
        """Run ``command`` here; its output goes to ``log``."""
        here = ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "--mount"]
        with log.open("wb") as file:
            return subprocess.Popen(
                [*here, "bash", "-c", _ENTER, self.name, str(self._hosts_file), *command],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def cut(self) -> None:
        """Unplug the cable."""
        ip("-n", self._switch, "link", "set", self._port, "down")

    def remove(self) -> None:
        found = subprocess.run(["ip", "netns", "pids", self.namespace], capture_output=True, text=True)
        for pid in found.stdout.split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        time.sleep(0.1)  # their sockets close
        subprocess.run(["ip", "netns", "del", self.namespace], capture_output=True)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[list[Host]]:
    """Two hosts, node-a and node-b."""
    missing = [name for name in NEEDS if shutil.which(name) is None]
    if os.geteuid() != 0 or missing:
        pytest.skip("needs root and iproute2: apt-get install iproute2 hostname util-linux, then run as root")
    prefix = f"moescale{os.getpid()}"
    switch, hosts_file = f"{prefix}s", tmp_path / "hosts"
    try:
        ip("netns", "add", switch)
        ip("-n", switch, "link", "add", "br0", "type", "bridge")
        ip("-n", switch, "link", "set", "br0", "up")
    except subprocess.CalledProcessError as error:
        subprocess.run(["ip", "netns", "del", switch], capture_output=True)
        pytest.skip(f"this kernel or container allows no network namespaces: {error.stderr.strip()}")
    made: list[Host] = []
    try:
        for number in range(2):
            made.append(Host(f"{prefix}{number}", switch, number, hosts_file))
        names = [f"{host.address} {host.name}" for host in made]
        hosts_file.write_text("\n".join(["127.0.0.1 localhost", *names]) + "\n")
        yield made
    finally:
        for host in made:
            host.remove()
        subprocess.run(["ip", "netns", "del", switch], capture_output=True)


@pytest.fixture
def run_section(tmp_path: Path) -> dict[str, Any]:
    """A small mixture's configuration over generated text."""
    generator = random.Random(0)
    words = ["the", "model", "sends", "a", "token", "to", "an", "expert", "that", "knows", "what", "to", "do"]
    for document in range(20):
        lines = [" ".join(generator.choices(words, k=12)) + f" {generator.random()}" for _ in range(60)]
        (tmp_path / f"{document:02d}.txt").write_text("\n".join(lines))
    return {
        "name": "two-hosts",
        "model": {"layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "ffn": 64, "vocab_multiple": 64},
        "moe": {"experts": 4, "active": 2, "expert_width": 24},
        "data": {
            "path": str(tmp_path / "prepared"),
            "domains": {"words": {"files": [str(tmp_path / "*.txt")]}},
            "tokenizer": {"vocab": 320},
            "samples": 8192,
        },
        "optimizer": {"lr": 0.01, "eps": 1e-3},
        "schedule": {"kind": "constant", "warmup": 0},
        "training": {"seq": 32, "batch": 8, "steps": 5},
        "eval": {"sequences": 8},
        "logging": {"tensorboard": False},
        "runtime": {"threads": 1, "timeout": 60},
    }


@pytest.fixture
def slurm() -> Iterator[SlurmCluster]:
    """Four nodes on this host under a throw-away Slurm."""
    if absent := missing():
        pytest.skip(f"needs Slurm (no {', '.join(absent)}): {INSTALL}")
    with tempfile.TemporaryDirectory(prefix="slurm") as folder:  # short: a socket's path has 107 characters at most
        cluster = SlurmCluster(Path(folder))
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()
