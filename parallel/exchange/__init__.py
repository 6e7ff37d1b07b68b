"""Token exchange (all-to-all) between the ranks that share out a layer's experts: one protocol, several backends."""

import torch.distributed as dist
from torch.distributed import ProcessGroup

from ..config import ExchangeKind
from .collective import TorchExchange
from .protocol import Exchange, LocalExchange

__all__ = ["Exchange", "LocalExchange", "TorchExchange", "make_exchange"]


def make_exchange(kind: ExchangeKind, group: ProcessGroup) -> Exchange:
    """The exchange of an expert group; ``kind`` as in ``parallel.exchange``."""
    if dist.get_world_size(group) == 1:
        return LocalExchange()
    return {"torch": TorchExchange}[kind](group)
