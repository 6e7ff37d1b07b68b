"""Where ranks first meet: rank 0's store, at an address that every host can reach."""

import datetime
import importlib.util
import json
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass

import torch.distributed as dist

from ..base.errors import UserError
from .failure import Failure, LostRank, Patience
from .launchers import Start, find_start

# What a host calls itself: "localhost", and the line that Debian's installer writes for the host's own name. Other
# numbers of 127.0.0.0/8 are nobody's default; who gives them to the "hosts" of a rehearsal on one machine means it.
ITSELF = frozenset({"127.0.0.1", "127.0.1.1", "::1"})
_LONGEST = 512  # bytes of the message in which rank 0 says where it is
_LOOK = 1e-3  # seconds between two looks for it


@dataclass(frozen=True)
class Meeting:
    """The store, and the address of rank 0 (or of torchrun's agent beside it)."""

    store: dist.Store
    address: str


def meet(patience: Patience) -> Meeting:
    """Connect with rank 0, as whoever started this process says.

    Raises:
        UserError: the address cannot be that of rank 0, or cannot be agreed on.
        LostRank: rank 0 cannot be reached.
    """
    start = find_start()
    if start.address is None or start.port is None:
        return _agree(start, patience)
    address = reachable_from_all(start.address, start)
    serves = start.place.rank == 0 and not start.served
    return Meeting(_open_store(address, start.port, start, serves, patience), address)


def reachable_from_all(address: str, start: Start) -> str:
    """The address to call rank 0 at: ``address``, or what Slurm has for a node whose name nobody else knows.

    Raises:
        UserError: it has no number, or one by which every host means itself. Each host would wait for a rank 0 of its
            own, or find that of another run.
    """
    numbers = numbers_of(address)
    if not numbers and (known := _address_of_node(address)):
        address, numbers = known, numbers_of(known)
    here = socket.gethostname()
    if not numbers:
        raise UserError(
            f"{start.source} ({address}) has no network address on {here}; let DNS or /etc/hosts of every host know "
            "it, or set MASTER_ADDR to the address of rank 0's host"
        )
    if start.several_hosts and ITSELF & set(numbers):
        raise UserError(
            f"{start.source} ({address}) is {', '.join(numbers)} on {here}, by which every host means itself, and "
            f"{start.place.world} ranks with {start.place.local_world} here are on several hosts; set MASTER_ADDR to "
            "an address of rank 0's host that all hosts can reach, or take the name out of the loopback line of its "
            "/etc/hosts"
        )
    return address


def numbers_of(name: str) -> list[str]:
    """The network addresses of a host by name; none where it has none."""
    try:
        return list(dict.fromkeys(str(found[4][0]) for found in socket.getaddrinfo(name, None)))
    except OSError:
        return []


def _address_of_node(node: str) -> str | None:
    """How Slurm itself reaches a node whose name is no host name.

    Asked only then: a thousand ranks that ask at once are a load for its controller.
    """
    if shutil.which("scontrol") is None:
        return None
    try:
        asked = subprocess.run(
            ["scontrol", "show", "node", node], capture_output=True, text=True, timeout=30, check=False
        )
    except subprocess.TimeoutExpired:
        return None
    words = dict(word.split("=", 1) for word in asked.stdout.split() if "=" in word)
    return words.get("NodeAddr")


def _agree(start: Start, patience: Patience) -> Meeting:
    """Rank 0 opens a store on a port of the system's choice and tells the others by MPI where it is."""
    store, told = None, ""
    if start.place.rank == 0:  # before MPI is started: a process that never was in MPI may end without the others
        address = start.address or (socket.gethostname() if start.several_hosts else "127.0.0.1")
        source = start.source if start.address else "this host's own name"
        address = reachable_from_all(address, Start(start.launcher, start.place, 0, start.several_hosts, source=source))
        numbers = numbers_of(address)  # the others may know that name by another number
        store = _open_store(numbers[0], start.port or 0, start, True, patience)
        told = json.dumps([numbers[0], store.port])
    address, port = json.loads(_broadcast(told, start, patience))
    return Meeting(store or _open_store(address, port, start, False, patience), address)


def _broadcast(text: str, start: Start, patience: Patience) -> str:
    """Rank 0's text on every rank. MPI itself would wait for ever."""
    if importlib.util.find_spec("mpi4py") is None:
        raise UserError(
            "ranks of mpirun need mpi4py to find each other: pip install 'moescale[mpi]', or give all of them "
            "MASTER_ADDR and MASTER_PORT"
        )
    from mpi4py import MPI

    place = start.place
    if (MPI.COMM_WORLD.Get_rank(), MPI.COMM_WORLD.Get_size()) != (place.rank, place.world):
        library = MPI.Get_library_version().split(",")[0].strip()
        raise UserError(
            f"mpirun says rank {place.rank} of {place.world}, mpi4py says {MPI.COMM_WORLD.Get_rank()} of "
            f"{MPI.COMM_WORLD.Get_size()}: mpi4py uses {library}, which is not what this mpirun belongs to; start with "
            "its mpirun, or give all ranks MASTER_ADDR and MASTER_PORT"
        )
    message = bytearray(text.encode().ljust(_LONGEST))
    request, deadline = MPI.COMM_WORLD.Ibcast(message, root=0), time.monotonic() + patience.wait
    while not request.Test():
        if time.monotonic() > deadline:
            raise LostRank(Failure((0,), f"rank 0 did not say by MPI where it is within {patience.wait:g} s"))
        time.sleep(_LOOK)
    return message.decode().rstrip()


def _open_store(address: str, port: int, start: Start, serves: bool, patience: Patience) -> dist.TCPStore:
    place = start.place
    try:
        return dist.TCPStore(
            address,
            port,
            place.world,
            is_master=serves,
            timeout=datetime.timedelta(seconds=patience.wait),
            wait_for_workers=False,  # the roll call waits, and says who is missing
            multi_tenant=True,
        )
    except dist.DistError as error:
        said = str(error).splitlines()[0]
        if serves and "EADDRINUSE" in said:
            raise UserError(
                f"MASTER_PORT ({port}) is in use on {socket.gethostname()} by another process; set MASTER_PORT to a "
                "free one for all ranks"
            ) from None
        raise LostRank(
            Failure(
                (0,),
                f"rank {place.rank} on {socket.gethostname()} found nobody at {address} ({start.source}), port {port}, "
                f"within {patience.wait:g} s; is rank 0 started there, and may hosts connect to that port? ({said})",
            )
        ) from None
