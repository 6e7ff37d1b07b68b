"""The token exchange on CUDA through csrc/: grouped sends and receives of NCCL on a stream of their own.

The communicator is the process group's own. A second one would take buffers on the GPU and threads on the host for each
group, and torch's watchdog, which ends a process whose peers are gone, would not abort it. torch's collectives of the
group and ours are ordered by NCCL, since they share the communicator.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ...base.errors import UserError
from ...compat.native import load_native
from .collective import TorchExchange
from .plan import Moves, Plan, Segment, move


class NcclExchange(TorchExchange):
    """Exchange over an NCCL ``group``; counts go through torch.distributed.

    Args:
        stream: where transfers run; default: a new one, with priority over computation. Exchanges whose transfers
            follow each other share one.

    Raises:
        UserError: the group is not NCCL's, or csrc/ was built without CUDA or NCCL.
    """

    def __init__(self, group: ProcessGroup, stream: torch.cuda.Stream | None = None):
        if dist.get_backend(group) != "nccl":
            raise UserError(
                f"parallel.exchange (nccl) needs CUDA; this group's backend is {dist.get_backend(group)}: take "
                "parallel.exchange=torch"
            )
        absent = load_native() or ("" if _built() else "csrc/ was built where CUDA or NCCL's header was not found")
        if absent:
            raise UserError(
                f"parallel.exchange (nccl) needs csrc/ with NCCL: {absent}; or take parallel.exchange=torch"
            )
        super().__init__(group)
        self.stream = stream or torch.cuda.Stream(priority=-1)
        self._communicator = _communicator(group)

    def rows(self, rows_RD: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        return move(rows_RD, self.plan(Moves.flat(sent, received)))

    def plan(self, moves: Moves) -> Plan:
        return NcclPlan(self._communicator, self.stream, moves)

    def close(self) -> None:
        self.stream.synchronize()


@dataclass(frozen=True)
class NcclPlan:
    """`Moves` as one group of sends and receives, straight from and to where the segments lie."""

    communicator: int
    stream: torch.cuda.Stream
    moves: Moves

    @property
    def leaving(self) -> int:
        return self.moves.leaving

    @property
    def arriving(self) -> int:
        return self.moves.arriving

    def reversed(self) -> Self:
        return type(self)(self.communicator, self.stream, self.moves.reversed())

    def start(self, rows_RD: Tensor, into_RD: Tensor) -> "NcclTransfer":
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            torch.ops.moescale_nccl.exchange(
                rows_RD, into_RD, _table(self.moves.sends), _table(self.moves.receives), self.communicator
            )
        return NcclTransfer(rows_RD, into_RD, self.stream.record_event())


@dataclass
class NcclTransfer:
    """A transfer on another stream. Holds what it reads and writes, so that the memory is not used again before."""

    rows: Tensor
    into: Tensor
    done: torch.cuda.Event

    def wait(self) -> Tensor:
        torch.cuda.current_stream().wait_event(self.done)
        return self.into

    def relay(self) -> Tensor:
        return self.into  # what follows is on the same stream


def nccl_levels() -> Callable[[ProcessGroup], NcclExchange]:
    """Makes exchanges whose transfers follow each other on one stream, for `two_level`."""
    stream = torch.cuda.Stream(priority=-1)
    return lambda group: NcclExchange(group, stream)


def _built() -> bool:
    return hasattr(torch.ops.moescale_nccl, "exchange")


def _communicator(group: ProcessGroup) -> int:
    """Address of the group's ``ncclComm_t``. torch makes it with the first collective, so there must have been one."""
    dist.all_reduce(torch.zeros(1, device="cuda"), group=group)
    backend: Any = group._get_backend(torch.device("cuda"))  # torch's stubs know NCCL's only where CUDA is
    address = int(backend._comm_ptr())
    if address == 0:
        raise RuntimeError("torch gives no NCCL communicator for the group after a collective")
    return address


def _table(segments: Sequence[Segment]) -> Tensor:
    """``[S, 3]``: peer, first row, rows."""
    return torch.tensor([(one.peer, one.first, one.rows) for one in segments], dtype=torch.int64).view(-1, 3)
