"""``doctor --cluster`` for a terminal."""

from rich.console import Group
from rich.table import Table

from ..base.progress import memory
from .cluster_doctor import Findings, first_ranks
from .cluster_report import Report


def table(findings: Findings) -> Group:
    """A line for each host, one for each measured link, one for each fault."""
    tables = [_hosts(findings), _links(findings)] if findings.links else [_hosts(findings)]
    return Group(*tables, *([_faults(findings)] if findings.faults else ["nothing is wrong"]))


def _hosts(findings: Findings) -> Table:
    ahead = {clock.rank: f"{clock.ahead * 1e3:+.1f} ms" for clock in findings.clocks}
    shown = Table(
        "host",
        "ranks",
        "cores",
        "devices",
        "address",
        "interface",
        "own name is",
        "memory",
        "/dev/shm",
        "clock",
        "free",
    )
    for rank in first_ranks(findings.reports):
        one = findings.reports[rank]
        ranks = [other for other in findings.reports if other.host == one.host]
        cores = len({core for other in ranks for core in other.cores})
        shm = "none" if one.shared_memory is None else memory(one.shared_memory)
        free = "\n".join(f"{folder}: {_room(room)}" for folder, room in one.folders.items())
        shown.add_row(
            one.host, str(len(ranks)), str(cores), _devices(one), one.address, one.interface,
            "\n".join(one.addresses) or "unknown", memory(one.memory), shm, ahead.get(rank, ""), free,
        )  # fmt: skip
    return shown


def _devices(one: Report) -> str:
    return f"{len(one.devices)} x {one.devices[0]}" if one.devices else "none"


def _room(room: int | str) -> str:
    return room if isinstance(room, str) else memory(room)


def _links(findings: Findings) -> Table:
    shown = Table("from", "to", "bandwidth", "latency")
    for link in findings.links:
        ends = [f"rank {rank} on {findings.reports[rank].host}" for rank in (link.source, link.target)]
        shown.add_row(*ends, f"{memory(link.bandwidth)}/s", f"{link.latency * 1e6:.0f} us")
    return shown


def _faults(findings: Findings) -> Table:
    shown = Table("where", "what is wrong", "what to do")
    for fault in findings.faults:
        shown.add_row(fault.where, fault.what, fault.advice)
    return shown
