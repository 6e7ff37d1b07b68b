"""``doctor --cluster``: every rank looks at its host, rank 0 compares, and says what to fix.

It needs less than a run does: reports travel through rank 0's store, so that a network over which the ranks' libraries
cannot reach each other is a line of the result and not its end.
"""

import datetime
import json
import socket
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch
import torch.distributed as dist

from ..base.errors import UserError
from ..parallel.failure import Failure, LostRank, Patience
from ..parallel.launchers import Place, device_of, find_start
from ..parallel.meeting import meet
from ..parallel.roll_call import Arrival, call_roll
from .cluster_faults import Fault, find_faults
from .cluster_network import Clock, Link, measure_clocks, measure_links
from .cluster_report import Report, existing, report

TIMEOUT = 120.0  # seconds that a rank waits for the last one
_LEAVING = 5.0  # seconds that rank 0, who holds the store, waits for the others to read the verdict


@dataclass(frozen=True)
class Findings:
    """What all ranks found, and what is wrong with it."""

    reports: list[Report]
    links: list[Link]
    clocks: list[Clock]
    faults: list[Fault]

    def as_json(self) -> dict[str, Any]:
        return {"ok": not self.faults, **asdict(self)}


def examine_cluster(out: Path, cache: Path, timeout: float = TIMEOUT) -> tuple[bool, Findings | None]:
    """Look at all hosts of the world that this process is a rank of. Every rank calls it.

    Args:
        out: folder that runs are written to; all ranks of a run must see the same.
        cache: folder of prepared data.

    Returns:
        Whether nothing is wrong; and on rank 0 what was found.

    Raises:
        UserError: this process is alone, or the launcher's variables make no sense.
        LostRank: ranks did not come, or ended.
    """
    start = find_start()
    place = start.place
    if place.world == 1:
        raise UserError(
            "doctor --cluster compares ranks, and this process is alone; start it on all hosts, for example "
            "srun --ntasks-per-node 1 python -m moescale doctor --cluster, or with torchrun or mpirun"
        )
    patience = Patience(timeout)
    meeting = meet(patience)
    store = dist.PrefixStore("doctor", meeting.store)
    roll = call_roll(store, place.rank, place.world, socket.gethostname(), Arrival(), patience.wait)
    exchange = _Exchange(roll.store, place.rank, place.world, patience.wait)
    reports = [
        Report(**_tuples(told))
        for told in exchange.gather("report", asdict(report(start, meeting.address, [out, cache])))
    ]
    firsts = exchange.publish("hosts", first_ranks(reports))
    on_cuda = exchange.publish("devices", bool(reports) and all(one.devices for one in reports))
    sees = exchange.gather("sees", _sees_rank_0(exchange, out))
    network = exchange.gather("network", _measure(roll.store, place, firsts, on_cuda, patience))
    findings = _join(reports, sees, network) if place.rank == 0 else None
    ok = exchange.publish("ok", findings is not None and not findings.faults)
    exchange.leave()
    return ok, findings


def first_ranks(reports: Sequence[Report]) -> list[int]:
    """The first rank of each host, in the order of ranks."""
    first: dict[str, int] = {}
    for one in reports:
        first.setdefault(one.host, one.rank)
    return list(first.values())


def neighbours(firsts: Sequence[int]) -> list[tuple[int, int]]:
    """Pairs of hosts next to each other, the last and the first too; on one host, its first two ranks."""
    if len(firsts) == 1:
        return [(0, 1)]
    pairs = list(zip(firsts, firsts[1:], strict=False))
    return [*pairs, (firsts[-1], firsts[0])] if len(firsts) > 2 else pairs


def _sees_rank_0(exchange: "_Exchange", out: Path) -> bool:
    """Whether this rank sees a file that rank 0 puts where runs are written to; all do where rank 0 may not."""
    with ExitStack() as held:
        mark = ""
        if exchange.rank == 0:
            with suppress(OSError):
                mark = held.enter_context(NamedTemporaryFile(dir=existing(out), prefix=".moescale-doctor-")).name
        shown = exchange.publish("mark", mark)
        sees = not shown or Path(shown).exists()
        exchange.gather("looked", None)  # before the file goes
        return sees


def _measure(
    store: dist.Store, place: Place, firsts: Sequence[int], on_cuda: bool, patience: Patience
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], str]:
    """Links and clocks as this rank measured them, and why ranks cannot talk with each other."""
    try:
        if on_cuda:
            torch.cuda.set_device(device_of(place, torch.cuda.device_count()))
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_cuda else "gloo",
            store=dist.PrefixStore("network", store),
            rank=place.rank,
            world_size=place.world,
            timeout=datetime.timedelta(seconds=patience.wait / 2),
        )
        clocks = measure_clocks(firsts[1:])
        links = measure_links(neighbours(firsts))
        return [asdict(link) for link in links], [asdict(clock) for clock in clocks], ""
    except (RuntimeError, ValueError, UserError) as error:
        return [], [], str(error).splitlines()[0]
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _join(reports: list[Report], sees: Sequence[bool], network: Sequence[Any]) -> Findings:
    links = [Link(**link) for told in network for link in told[0]]
    clocks = [Clock(**clock) for told in network for clock in told[1]]
    troubles = {rank: told[2] for rank, told in enumerate(network) if told[2]}
    blind = [rank for rank, seen in enumerate(sees) if not seen]
    return Findings(reports, links, clocks, find_faults(reports, links, clocks, troubles, blind))


class _Exchange:
    """Between rank 0 and the others, through the store."""

    def __init__(self, store: dist.Store, rank: int, world: int, timeout: float):
        self._store, self.rank, self._world, self._timeout = store, rank, world, timeout

    def gather(self, what: str, mine: Any) -> list[Any]:
        """What each rank tells, by rank; rank 0 alone hears it."""
        self._store.set(f"{what}/{self.rank}", json.dumps(mine))
        if self.rank != 0:
            return []
        return [json.loads(self._get(f"{what}/{rank}", rank)) for rank in range(self._world)]

    def publish(self, what: str, mine: Any) -> Any:
        """What rank 0 tells. The others wait longer: rank 0 may be waiting for the last of them."""
        if self.rank == 0:
            self._store.set(what, json.dumps(mine))
            return mine
        return json.loads(self._get(what, 0, 2))

    def leave(self) -> None:
        """Rank 0 ends last: the store ends with it."""
        self._store.set(f"left/{self.rank}", "")
        if self.rank == 0:
            try:
                keys = [f"left/{rank}" for rank in range(self._world)]
                self._store.wait(keys, datetime.timedelta(seconds=_LEAVING))
            except dist.DistError:
                return  # somebody ended early; it has been heard

    def _get(self, key: str, rank: int, turns: int = 1) -> bytes:
        limit = turns * self._timeout
        try:
            self._store.wait([key], datetime.timedelta(seconds=limit))
            return self._store.get(key)
        except dist.DistError:
            raise LostRank(Failure((rank,), f"rank {rank} said nothing for {limit:g} s, or ended")) from None


def _tuples(told: dict[str, Any]) -> dict[str, Any]:
    """JSON knows lists only."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in told.items()}
