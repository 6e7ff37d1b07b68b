"""The token exchange through MPI, for clusters of CPUs whose network MPI knows best. Needs mpi4py."""

import importlib.util
import itertools
import math
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ...base.errors import UserError
from .gradient import differentiable

_PAUSE = 1e-4  # seconds between two looks at an exchange that does not come
_BUSY = 1e-3  # seconds of looking without a pause


class MpiExchange:
    """``MPI_Ialltoallv`` over a communicator of the group's ranks.

    The processes must be ranks of one ``mpirun``; their numbers there need not be those in torch.distributed.

    Args:
        group: any torch.distributed group.
        timeout: seconds after which a silent peer is an error. MPI itself would wait for ever.

    Raises:
        UserError: mpi4py is not installed, or mpirun did not start all of these processes.
    """

    def __init__(self, group: ProcessGroup, timeout: float):
        if importlib.util.find_spec("mpi4py") is None:
            raise UserError("parallel.exchange (mpi) needs mpi4py: pip install 'moescale[mpi]', or take torch")
        if torch.cuda.is_available():
            raise UserError("parallel.exchange (mpi) serves CPU ranks, and tokens are on GPUs here; take torch or nccl")
        from mpi4py import MPI

        self.size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        self.timeout = timeout
        places: list[Any] = [None] * self.size
        dist.all_gather_object(places, MPI.COMM_WORLD.Get_rank(), group=group)
        if len(set(places)) < self.size or MPI.COMM_WORLD.Get_size() < self.size:
            raise UserError(
                f"parallel.exchange (mpi) needs all {self.size} expert-parallel ranks under one mpirun; MPI knows "
                f"{MPI.COMM_WORLD.Get_size()} process(es) here: start with mpirun, or take torch"
            )
        self._mpi = MPI
        self._members = MPI.COMM_WORLD.group.Incl(places)
        self._communicator = MPI.COMM_WORLD.Create_group(self._members)

    def counts(self, sent_PE: Tensor) -> Tensor:
        return self._send(sent_PE, [1] * self.size, [1] * self.size)

    def rows(self, rows_RD: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        return differentiable(self._send, rows_RD, sent, received)

    def _send(self, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        rows = rows.contiguous()
        arrived = rows.new_empty(sum(received), *rows.shape[1:])
        # Counted in rows, so that no count passes MPI's 2^31 - 1 where bytes would.
        row = self._mpi.BYTE.Create_contiguous(math.prod(rows.shape[1:]) * rows.element_size()).Commit()
        try:
            request = self._communicator.Ialltoallv(
                [_bytes(rows), (list(sent), _starts(sent)), row],
                [_bytes(arrived), (list(received), _starts(received)), row],
            )
            self._wait(request)
        finally:
            row.Free()
        return arrived

    def _wait(self, request: Any) -> None:
        began = time.monotonic()
        while not request.Test():
            spent = time.monotonic() - began
            if spent > self.timeout:
                raise RuntimeError(
                    f"rank {self.rank} of {self.size} in its expert group has waited {self.timeout:g} s for the others "
                    "in an exchange through MPI (see runtime.timeout)"
                )
            if spent > _BUSY:
                time.sleep(_PAUSE)

    def close(self) -> None:
        self._communicator.Free()
        self._members.Free()


def _bytes(tensor: Tensor) -> Any:
    """The tensor's memory; numpy, through which mpi4py reads it, knows no bfloat16."""
    return tensor.detach().view(-1).view(torch.uint8).numpy()


def _starts(counts: Sequence[int]) -> list[int]:
    return [0, *itertools.accumulate(counts)][:-1]
