"""A throw-away Slurm on this host: munged, slurmctld and several slurmd, each a node, below one folder.

No systemd, nothing in /etc. Debian's packages: ``apt-get install slurm-wlm munge``. On request with accounting (a
MariaDB and slurmdbd of its own) and with limits on memory, for which root and cgroups of version 1 are needed.
"""

import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

INSTALL = "apt-get install slurm-wlm munge"
INSTALL_ACCOUNTING = f"{INSTALL} slurmdbd mariadb-server"
_PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
_DAEMONS = ("munged", "slurmctld", "slurmd")
_ACCOUNTING = ("slurmdbd", "mariadbd", "mariadb-install-db", "sacct")
_MEMORY_CGROUP = Path("/sys/fs/cgroup/memory")
# cred_expire: a requeued job would wait for the default of 120 s. SlurmdTimeout: a dead node is noticed after that.
_CONFIG = """
ClusterName=throwaway
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={root}/munge/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd.%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd.%n.log
ProctrackType=proctrack/{tracking}
TaskPlugin=task/{task}
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,requeue_delay=1
SelectType=select/cons_tres
SelectTypeParameters=CR_{resources}
MinJobAge={memory_of_jobs}
KillWait=20
SlurmdTimeout=10
SlurmctldTimeout=10
TCPTimeout=5
MessageTimeout=30
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
{accounting}
{nodes}
PartitionName=batch Nodes=ALL Default=YES MaxTime=60 State=UP PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=ALL MaxTime=60 State=UP PriorityTier=10 PreemptMode=OFF
"""
_DBD_CONFIG = """
AuthType=auth/munge
AuthInfo=socket={root}/munge/munge.sock
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={port}
SlurmUser={user}
PidFile={root}/run/slurmdbd.pid
LogFile={root}/log/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={database}
StorageUser=slurm
StoragePass={password}
StorageLoc=accounting
"""
_CGROUP_CONFIG = """
CgroupPlugin=cgroup/v1
CgroupMountpoint=/sys/fs/cgroup
ConstrainRAMSpace=yes
ConstrainSwapSpace=yes
AllowedSwapSpace=0
"""


def missing(*, accounting: bool = False) -> list[str]:
    """Programs that the cluster needs and this machine lacks."""
    needed = (*_DAEMONS, "sbatch", "srun", *(_ACCOUNTING if accounting else ()))
    return [name for name in needed if shutil.which(name, path=_PATH) is None]


def can_limit_memory() -> bool:
    """Whether this process may make memory cgroups of version 1."""
    return os.geteuid() == 0 and (_MEMORY_CGROUP / "cgroup.procs").exists()


def until(condition: Callable[[], bool], what: str, seconds: float, tick: float = 0.1) -> None:
    """Wait for something that has to come."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:g} s in vain: {what}"
        time.sleep(tick)


class SlurmCluster:
    """The cluster below ``root``. Commands find it with `environment`."""

    def __init__(
        self, root: Path, nodes: int = 4, cores: int = 1, *, accounting: bool = False, limit_memory: bool = False
    ):
        self.root, self.accounting, self.password = root, accounting, secrets.token_hex(16)
        self.limits_memory = limit_memory
        self._database: subprocess.Popen[bytes] | None = None
        self.nodes = [f"node{number}" for number in range(1, nodes + 1)]
        self.environment = {**os.environ, "SLURM_CONF": str(root / "slurm.conf"), "PATH": _PATH}
        for folder in ("munge", "state", "run", "log", *(f"spool/{node}" for node in self.nodes)):
            (root / folder).mkdir(parents=True)
        (root / "munge").chmod(0o700)
        *ports, self.database_port, dbd_port = _free_ports(nodes + 3)
        lines = [
            f"NodeName={node} NodeHostname=localhost NodeAddr=127.0.0.{10 + number} Port={ports[number]} "
            f"CPUs={cores} RealMemory=16000 State=UNKNOWN"
            for number, node in enumerate(self.nodes, 1)
        ]
        storage = "none"
        if accounting:  # squeue forgets soon, so that sacct is asked
            storage = f"slurmdbd\nAccountingStorageHost=127.0.0.1\nAccountingStoragePort={dbd_port}\n"
            storage += f"AccountingStoragePass={root}/munge/munge.sock"  # where munge is asked, not a password
        common = {"root": root, "user": getpass.getuser()}
        config = _CONFIG.format(
            port=ports[0], nodes="\n".join(lines), accounting=f"AccountingStorageType=accounting_storage/{storage}",
            memory_of_jobs=2 if accounting else 600,
            tracking="cgroup" if limit_memory else "linuxproc", task="cgroup" if limit_memory else "none",
            resources="CPU_Memory" if limit_memory else "CPU", **common,
        )  # fmt: skip
        (root / "slurm.conf").write_text(config)
        if limit_memory:
            (root / "cgroup.conf").write_text(_CGROUP_CONFIG)
        if accounting:
            path = root / "slurmdbd.conf"
            path.write_text(
                _DBD_CONFIG.format(port=dbd_port, database=self.database_port, password=self.password, **common)
            )
            path.chmod(0o600)

    def start(self) -> None:
        """Every daemon, until all nodes are idle."""
        munge = self.root / "munge"
        (munge / "key").write_bytes(os.urandom(1024))
        (munge / "key").chmod(0o600)
        self._call(
            "munged", "--force", f"--key-file={munge}/key", f"--socket={munge}/munge.sock",
            f"--pid-file={self.root}/run/munged.pid", f"--log-file={self.root}/log/munged.log",
            f"--seed-file={munge}/seed", "--num-threads=2",
        )  # fmt: skip
        if self.accounting:
            self._start_accounting()
        self._call("slurmctld", "-c")
        until(lambda: self.ask("scontrol", "ping").returncode == 0, "slurmctld", 30)
        for node in self.nodes:
            self.start_node(node)
        until(lambda: self.idle() == len(self.nodes), "idle nodes", 60)

    def _start_accounting(self) -> None:
        """A MariaDB of our own, slurmdbd on it, and the cluster's name in it."""
        data, socket_file = self.root / "database", self.root / "run" / "mariadb.sock"
        user = getpass.getuser()
        self._call("mariadb-install-db", "--no-defaults", f"--user={user}", f"--datadir={data}", "--skip-test-db")
        init = self.root / "run" / "init.sql"
        init.write_text(
            f"CREATE USER 'slurm'@'127.0.0.1' IDENTIFIED BY '{self.password}';\n"
            "GRANT ALL ON accounting.* TO 'slurm'@'127.0.0.1';\n"
        )
        program = shutil.which("mariadbd", path=_PATH)
        assert program is not None
        with (self.root / "log" / "mariadb.log").open("wb") as log:
            self._database = subprocess.Popen(
                [program, "--no-defaults", f"--user={user}", f"--datadir={data}", f"--socket={socket_file}",
                 f"--port={self.database_port}", "--bind-address=127.0.0.1", "--skip-name-resolve",
                 f"--init-file={init}"],
                stdout=log, stderr=log, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        until(lambda: _listens(self.database_port), f"a database\n{self.logs()}", 60)
        self._call("slurmdbd")
        add = ("sacctmgr", "--immediate", "add", "cluster", "throwaway")
        until(lambda: self.ask(*add).returncode == 0, f"slurmdbd\n{self.logs()}", 60, tick=0.5)

    def start_node(self, node: str) -> None:
        self._call("slurmd", "-N", node)

    def kill_node(self, node: str) -> None:
        """SIGKILL its daemon: Slurm takes the node for dead, what runs on it goes on, as when a network breaks."""
        os.kill(int((self.root / "run" / f"slurmd.{node}.pid").read_text()), signal.SIGKILL)

    def idle(self) -> int:
        """Nodes that have nothing to do."""
        return len(self.ask("sinfo", "-h", "-N", "-p", "batch", "-t", "idle").stdout.splitlines())

    def state_of(self, node: str) -> str:
        """idle, mixed, allocated, down*, ..."""
        return self.ask("sinfo", "-h", "-N", "-n", node, "-p", "batch", "-o", "%T").stdout.strip()

    def ask(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run one of Slurm's commands."""
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60, check=False)

    def queue(self) -> list[list[str]]:
        """(element of an array or job, state, name, reason) of what waits or runs."""
        return [line.split("|") for line in self.ask("squeue", "-h", "-r", "-o", "%i|%T|%j|%r").stdout.splitlines()]

    def logs(self) -> str:
        """What the daemons said last, for a test that fails."""
        return "\n".join(
            f"== {path.name}\n{path.read_text(errors='replace')[-3000:]}"
            for path in sorted((self.root / "log").iterdir())
        )

    def stop(self) -> None:
        """End all jobs, then the daemons, by the ids in their own files, then whoever is left of them."""
        with suppress(subprocess.TimeoutExpired):
            self.ask("scancel", "--full", "--signal=KILL", "--me")
            self.ask("scancel", "--me")
        with suppress(AssertionError):
            until(lambda: not self.queue(), "an empty queue", 15)
        pids = [int(path.read_text()) for path in sorted((self.root / "run").glob("*.pid"), reverse=True)]
        for pid in pids:  # slurmd, slurmctld, munged
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + 10
        for pid in pids:
            with suppress(ProcessLookupError):
                while time.monotonic() < deadline:
                    os.kill(pid, 0)
                    time.sleep(0.1)
                os.kill(pid, signal.SIGKILL)
        if self._database is not None:
            self._database.terminate()
            try:
                self._database.wait(15)
            except subprocess.TimeoutExpired:
                self._database.kill()
        ours = f"SLURM_CONF={self.environment['SLURM_CONF']}".encode()
        for process in psutil.process_iter():  # a slurmstepd does not end when its slurmd was killed
            with suppress(psutil.Error, OSError):
                # Not by psutil's environ(), which ends at the hole that slurmstepd's new title leaves there.
                if ours in Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0"):
                    process.kill()
        if self.limits_memory:
            time.sleep(0.5)  # a cgroup can go when its last process has
        for node in self.nodes if self.limits_memory else ():
            for group in ("memory", "freezer"):
                _remove_group(_MEMORY_CGROUP.parent / group / f"slurm_{node}")

    def _call(self, name: str, *arguments: str) -> None:
        program = shutil.which(name, path=_PATH)
        assert program is not None
        done = subprocess.run([program, *arguments], env=self.environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{name}: {done.stderr}\n{self.logs()}"


def _remove_group(path: Path) -> None:
    """A cgroup with those below it; one that still has processes stays."""
    for folder, _, _ in os.walk(path, topdown=False):
        with suppress(OSError):
            Path(folder).rmdir()


def _listens(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
