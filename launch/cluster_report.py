"""What one rank knows of its host, for ``doctor --cluster``. Asks nobody else."""

import importlib.metadata
import os
import shutil
import socket
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from ..compat.versions import versions
from ..parallel.launchers import Start
from ..parallel.meeting import numbers_of
from ..parallel.messages import address_towards
from .doctor import tested_versions

# The interfaces that libraries were told to use.
INTERFACE_SETTINGS = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
_SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Report:
    """A rank and its host.

    Attributes:
        launcher: who started the rank.
        cores: that this process may use, by number.
        threads: that torch uses.
        devices: names of the devices that this process sees.
        addresses: what the host's own name stands for here.
        address: from which this host speaks to rank 0.
        interface: that has this address; "" where none has.
        settings: of `INTERFACE_SETTINGS` that are set.
        absent: settings with an interface that the host lacks.
        memory, shared_memory: bytes available in all and below /dev/shm; None where there is no such folder.
        folders: bytes free, or why they cannot be written to, by folder.
        facts: what must be the same on all ranks.
    """

    rank: int
    host: str
    local_world: int
    launcher: str
    cores: tuple[int, ...]
    threads: int
    devices: tuple[str, ...]
    addresses: tuple[str, ...]
    address: str
    interface: str
    settings: dict[str, str]
    absent: tuple[str, ...]
    memory: int
    shared_memory: int | None
    folders: dict[str, int | str]
    facts: dict[str, str]


def report(start: Start, master: str, folders: Sequence[Path]) -> Report:
    """Look at this host.

    Args:
        master: the address of rank 0.
        folders: that runs will write to.
    """
    address = address_towards(master)
    settings = {name: os.environ[name] for name in INTERFACE_SETTINGS if name in os.environ}
    interfaces = psutil.net_if_addrs()
    holders = [name for name, held in interfaces.items() if address in (one.address for one in held)]
    return Report(
        rank=start.place.rank,
        host=socket.gethostname(),
        local_world=start.place.local_world,
        launcher=start.launcher,
        cores=tuple(sorted(os.sched_getaffinity(0))),
        threads=torch.get_num_threads(),
        devices=tuple(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())),
        addresses=tuple(numbers_of(socket.gethostname())),
        address=address,
        interface=holders[0] if holders else "",
        settings=settings,
        absent=tuple(_absent(settings, interfaces)),
        memory=psutil.virtual_memory().available,
        shared_memory=shutil.disk_usage(_SHARED_MEMORY).free if _SHARED_MEMORY.is_dir() else None,
        folders={str(folder): _room(folder) for folder in folders},
        facts=_facts(),
    )


def _absent(settings: dict[str, str], interfaces: Collection[str]) -> Iterator[str]:
    """Names in the settings that no interface answers to.

    gloo takes a list of names. NCCL takes prefixes too, names after "=", and what to leave out after "^".
    """
    for setting, value in settings.items():
        if value.startswith("^"):
            continue
        in_full = setting == "GLOO_SOCKET_IFNAME" or value.startswith("=")
        for name in value.removeprefix("=").split(","):
            if not any(one == name if in_full else one.startswith(name) for one in interfaces):
                yield f"{setting}={name}"


def _room(folder: Path) -> int | str:
    """Bytes free where ``folder`` is or will be."""
    folder = existing(folder)
    if not os.access(folder, os.W_OK | os.X_OK):
        return f"{folder} may not be written to"
    try:
        return shutil.disk_usage(folder).free
    except OSError as error:
        return str(error)


def existing(folder: Path) -> Path:
    """``folder``, or the nearest above it that is there already."""
    while not folder.exists():
        folder = folder.parent
    return folder


def _facts() -> dict[str, str]:
    """Versions of the code, of what it was tested with, and of what decides how ranks understand each other."""
    found = versions()
    for name in tested_versions():
        try:
            found[f"version of {name}"] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[f"version of {name}"] = "missing"
    if torch.cuda.is_available():
        found["version of NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found
