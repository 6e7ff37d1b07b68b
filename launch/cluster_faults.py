"""What is wrong with a set of hosts, and what to do about it, from what their ranks found."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..base.progress import memory
from ..parallel.failure import name_ranks
from ..parallel.meeting import ITSELF
from ..parallel.roll_call import differences
from .cluster_network import Clock, Link
from .cluster_report import Report

ROOM = 5 << 30  # bytes that a folder should have free: a few checkpoints of a small model
# Docker gives 64 MiB; NCCL and MPI pass messages between ranks of a host through files in /dev/shm.
SHARED_MEMORY = 256 << 20
SKEW = 1.0  # seconds; times in status files and logs of several hosts are read side by side
SLOWEST = 50e6  # bytes/s; less than half of what a line of 1 Gbit/s gives
UNEVEN = 0.5  # of the median, from three links on


@dataclass(frozen=True)
class Fault:
    """``where``: ranks and hosts; ``advice``: what to do."""

    where: str
    what: str
    advice: str


def find_faults(
    reports: Sequence[Report],
    links: Sequence[Link],
    clocks: Sequence[Clock],
    troubles: Mapping[int, str],
    blind: Sequence[int],
) -> list[Fault]:
    """Everything that is wrong.

    Args:
        reports: of all ranks, by rank.
        troubles: why ranks could not talk with each other, by rank.
        blind: ranks that do not see rank 0's folder of runs.
    """
    hosts = [one.host for one in reports]
    found: list[Fault] = []
    for one in reports:
        found += _of_rank(one, reports[0], hosts)
    for host in dict.fromkeys(hosts):
        found += _of_host([one for one in reports if one.host == host], several=len(set(hosts)) > 1)
    found += _of_network(links, clocks, hosts)
    if blind:
        what = f"do not see what rank 0 writes to {next(iter(reports[0].folders))}"
        found.append(Fault(name_ranks(blind, hosts), what, "choose a folder on a file system that all hosts share"))
    if troubles:
        said = "; ".join(dict.fromkeys(troubles.values()))
        advice = (
            "let hosts connect to any port of each other, and name the interface between them: "
            "GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME"
        )
        found.append(Fault(name_ranks(sorted(troubles), hosts), f"cannot talk with the others: {said}", advice))
    return found


def _of_rank(one: Report, reference: Report, hosts: Sequence[str]) -> Iterator[Fault]:
    where = name_ranks([one.rank], hosts)
    if differing := differences(one.facts, reference.facts):
        yield Fault(where, "; ".join(differing), "start all ranks from one installation")
    if one.launcher != reference.launcher:
        what = f"started by {one.launcher}, rank 0 by {reference.launcher}"
        yield Fault(where, what, "pass the launcher's variables on to all hosts alike")
    if set(one.devices) != set(reference.devices):
        mine, others = (", ".join(dict.fromkeys(devices)) or "none" for devices in (one.devices, reference.devices))
        advice = "take nodes of one kind; a driver or CUDA_VISIBLE_DEVICES may hide devices"
        yield Fault(where, f"devices are {mine}, rank 0 has {others}", advice)
    if one.threads > len(one.cores):
        advice = f"set OMP_NUM_THREADS to {len(one.cores)}, or let the launcher bind the rank to more cores"
        yield Fault(where, f"{one.threads} threads take turns on {len(one.cores)} cores", advice)


def _of_host(ranks: Sequence[Report], several: bool) -> Iterator[Fault]:
    """What is the same for all ranks of a host; told by its first."""
    one, host = ranks[0], ranks[0].host
    cores = len({core for rank in ranks for core in rank.cores})
    if cores < len(ranks):
        advice = "start fewer ranks, or let the launcher bind them to more (--cpus-per-task, --bind-to none)"
        yield Fault(host, f"{len(ranks)} ranks take turns on {cores} cores", advice)
    if 1 < len(one.devices) < len(ranks):
        yield Fault(host, f"{len(ranks)} ranks have {len(one.devices)} devices", "start a rank for each device")
    if several and not one.settings and (not one.addresses or ITSELF & set(one.addresses)):
        is_what = ", ".join(one.addresses) or "no address"
        advice = (
            "gloo listens where the host's name leads: give the name its real address in /etc/hosts, or set "
            f"GLOO_SOCKET_IFNAME{f' ({one.interface} leads to rank 0)' if one.interface else ''}"
        )
        yield Fault(host, f"its own name is {is_what}", advice)
    for setting in dict.fromkeys(setting for rank in ranks for setting in rank.absent):
        yield Fault(host, f"{setting}: no such interface", "name one that `ip address` shows on every host")
    small = one.shared_memory is not None and one.shared_memory < SHARED_MEMORY
    if small and len(ranks) > 1 and (one.devices or one.launcher == "mpirun"):
        advice = "start the container with more (docker --shm-size, --ipc=host): NCCL and MPI need it within a host"
        yield Fault(host, f"/dev/shm has {memory(one.shared_memory or 0)} free", advice)
    for folder, room in one.folders.items():
        if isinstance(room, str):
            yield Fault(host, f"{folder}: {room}", "choose a folder that every host can write to")
        elif room < ROOM:
            yield Fault(host, f"{folder}: {memory(room)} free", "make room, or choose another disk")


def _of_network(links: Sequence[Link], clocks: Sequence[Clock], hosts: Sequence[str]) -> Iterator[Fault]:
    between = [link for link in links if hosts[link.source] != hosts[link.target]]
    usual = statistics.median(link.bandwidth for link in between) if len(between) > 2 else 0.0
    for link in between:
        where = f"{hosts[link.source]} to {hosts[link.target]}"
        if link.bandwidth < max(SLOWEST, UNEVEN * usual):
            what = f"{memory(link.bandwidth)}/s" + (f", between other hosts {memory(usual)}/s" if usual else "")
            advice = (
                "another interface may be faster (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME); look at cable and switch"
            )
            yield Fault(where, what, advice)
    for clock in clocks:
        if abs(clock.ahead) - clock.error > SKEW:
            way = "ahead of" if clock.ahead > 0 else "behind"
            what = f"its clock is {abs(clock.ahead):.1f} s {way} that of {hosts[0]}"
            yield Fault(
                hosts[clock.rank], what, "start its time service: chronyc makestep, or timedatectl set-ntp true"
            )
