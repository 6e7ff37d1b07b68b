"""Token exchange (all-to-all) between the ranks that share out a layer's experts: one protocol, several backends."""

from collections.abc import Callable

import torch.distributed as dist
from torch.distributed import ProcessGroup

from ..config import ExchangeKind
from .collective import TorchExchange
from .mpi import MpiExchange
from .nccl import NcclExchange, nccl_levels
from .protocol import Exchange, GatheringExchange, LocalExchange
from .shared import SharedExchange
from .two_level import TwoLevelExchange, two_level

__all__ = [
    "Exchange",
    "GatheringExchange",
    "LocalExchange",
    "MpiExchange",
    "NcclExchange",
    "SharedExchange",
    "TorchExchange",
    "TwoLevelExchange",
    "make_exchange",
]


def make_exchange(
    kind: ExchangeKind, group: ProcessGroup, timeout: float = 600.0, node: Callable[[int], int] = lambda rank: 0
) -> Exchange:
    """The exchange of an expert group, made by all of its ranks together.

    Args:
        kind: as in ``parallel.exchange``.
        timeout: seconds after which a silent peer is an error; torch's exchange has its group's.
        node: the node that a rank of the world is on, for ``two_level``.

    Raises:
        UserError: the ranks or what is installed do not allow this kind.
    """
    if dist.get_world_size(group) == 1:
        return LocalExchange()
    match kind:
        case "torch":
            return TorchExchange(group)
        case "shared":
            return SharedExchange(group, timeout)
        case "mpi":
            return MpiExchange(group, timeout)
        case "nccl":
            return NcclExchange(group)
        case "two_level":
            nodes = [node(rank) for rank in dist.get_process_group_ranks(group)]
            return two_level(group, nodes, nccl_levels() if dist.get_backend(group) == "nccl" else TorchExchange)
