"""The token exchange through shared memory: CPU ranks of one Linux host (csrc/cpu/exchange.cpp)."""

import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ...base.errors import UserError
from ...compat.native import load_native
from .gradient import differentiable

_ops = torch.ops.moescale_exchange


class SharedExchange:
    """Every rank writes its rows straight into the memory of the ranks that they go to.

    Rows that were received are that memory: it is free again when the last tensor over it goes.

    Args:
        group: ranks of one host.
        timeout: seconds after which a silent peer is an error.

    Raises:
        UserError: on all ranks of the group, if any of them runs elsewhere or lacks the native operations.
    """

    def __init__(self, group: ProcessGroup, timeout: float):
        self.size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        ranks = dist.get_process_group_ranks(group)
        _check_hosts(ranks, group)
        self._handle = _ops.open(ranks, self.rank, timeout)
        peers = _told_to_all((os.getpid(), _ops.file(self._handle)), group)
        complaints = _told_to_all(self._attach(peers), group)
        _ops.close_file(self._handle)  # all have opened it
        if any(complaints):
            self.close()
            _refuse(ranks, complaints)

    def counts(self, sent_PE: Tensor) -> Tensor:
        return self._send(sent_PE, [1] * self.size, [1] * self.size)

    def rows(self, rows_RD: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        return differentiable(self._send, rows_RD, sent, received)

    def gathered(
        self, rows_RD: Tensor, visit_R: Tensor, active: int, sent: Sequence[int], received: Sequence[int]
    ) -> Tensor:
        return self._send(rows_RD, sent, received, visit_R, active)

    def _send(
        self,
        rows: Tensor,
        sent: Sequence[int],
        received: Sequence[int],
        visit_R: Tensor | None = None,
        active: int = 1,
    ) -> Tensor:
        arrived: Tensor = _ops.send(rows.contiguous(), visit_R, active, sent, received, self._handle)
        return arrived

    def _attach(self, peers: Sequence[tuple[int, int]]) -> str:
        """Open the memory of the other ranks, given by process and file number; returns why that failed, or ""."""
        try:
            for place, (process, file) in enumerate(peers):
                if place != self.rank:
                    _ops.attach(self._handle, place, process, file)
        except RuntimeError as error:
            return str(error)
        return ""

    def close(self) -> None:
        _ops.close(self._handle)


def unavailable() -> str:
    """Why this process cannot exchange through shared memory; "" where it can."""
    if torch.cuda.is_available():
        return "it serves CPU ranks, and tokens are on GPUs here"
    if reason := load_native():
        return f"the native operations are not in use: {reason}"
    return "" if hasattr(_ops, "open") else "it needs Linux"


def _host() -> str:
    """The same for processes that can open each other's files: one running kernel, one process-id namespace."""
    if not Path("/proc/self/ns/pid").exists():
        return socket.gethostname()
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")


def _check_hosts(ranks: Sequence[int], group: ProcessGroup) -> None:
    """All ranks can exchange through shared memory, and with each other, or all of them say why not."""
    everyone = _told_to_all((unavailable(), _host(), socket.gethostname()), group)
    reasons, hosts, names = zip(*everyone, strict=True)
    if any(reasons):
        _refuse(ranks, reasons)
    if len(set(hosts)) > 1:
        told = ", ".join(f"rank {rank} on {name}" for rank, name in zip(ranks, names, strict=True))
        raise UserError(
            "parallel.exchange (shared) needs the expert-parallel ranks on one host and in one container, but "
            f"{told} are not; take torch or mpi"
        )


def _told_to_all(statement: Any, group: ProcessGroup) -> list[Any]:
    statements: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(statements, statement, group=group)
    return statements


def _refuse(ranks: Sequence[int], reasons: Sequence[str]) -> NoReturn:
    told = "; ".join(f"rank {rank}: {reason}" for rank, reason in zip(ranks, reasons, strict=True) if reason)
    raise UserError(f"parallel.exchange (shared) cannot be used: {told}; take torch or mpi")
