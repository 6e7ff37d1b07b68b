"""Experts spread over ranks, each rank a thread of this process: the sharded layer is the whole layer.

What goes over the wire is real (counts, rows, and their gradients); only the wire is a list in memory.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from moescale.moe import MoEConfig, MoELayer

D, E = 16, 8
CONFIG = MoEConfig(experts=E, active=2, expert_width=8, shared=1)


class Wire:
    """All-to-all among ``size`` threads."""

    def __init__(self, size: int):
        self.size = size
        self.barrier = threading.Barrier(size, timeout=20)
        self.posted: list[Sequence[Tensor]] = [()] * size

    def swap(self, rank: int, parts: Sequence[Tensor]) -> list[Tensor]:
        self.posted[rank] = parts
        self.barrier.wait()
        received = [self.posted[peer][rank] for peer in range(self.size)]
        self.barrier.wait()
        return received


class ThreadExchange:
    def __init__(self, wire: Wire, rank: int):
        self.wire, self.rank, self.size = wire, rank, wire.size

    def counts(self, sent_PE: Tensor) -> Tensor:
        return torch.stack(self.wire.swap(self.rank, sent_PE.unbind()))

    def rows(self, rows_RD: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        return Move.apply(rows_RD, self, list(sent), list(received))


class Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, exchange: ThreadExchange, sent: list[int], received: list[int]) -> Tensor:
        ctx.route = (exchange, received)
        arrived = exchange.wire.swap(exchange.rank, rows.split(sent))
        assert [len(part) for part in arrived] == received, "the counts announced are not the rows that came"
        return torch.cat(list(arrived))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        exchange, received = ctx.route
        return torch.cat(exchange.wire.swap(exchange.rank, gradients[0].split(received))), None, None, None


def shard(whole: MoELayer, exchange: ThreadExchange) -> MoELayer:
    layer = MoELayer(D, whole.config, exchange=exchange)
    local = E // exchange.size
    mine = slice(exchange.rank * local, (exchange.rank + 1) * local)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            full = whole.get_parameter(name)
            parameter.copy_(full[mine] if name.startswith("experts") else full)
    return layer


def work(layer: MoELayer, x: Tensor) -> dict[str, Tensor]:
    """Output and gradients of a loss that is a sum over tokens."""
    hidden = layer(x).hidden
    wanted = {"x": x, **dict(layer.named_parameters())}
    found = torch.autograd.grad((hidden * torch.cos(x.detach())).sum(), list(wanted.values()))
    return {"y": hidden.detach(), **dict(zip(wanted, found, strict=True))}


SKEWS = {"spread": None, "all to the first expert": 0, "all to the last expert": E - 1}


@pytest.mark.parametrize("lengths", [(5, 5), (7, 2), (4, 0), (3, 1, 0, 6)], ids=str)
@pytest.mark.parametrize("favourite", SKEWS.values(), ids=SKEWS)
def test_shards_are_the_whole(lengths: tuple[int, ...], favourite: int | None, make_layer: Callable[..., Any]) -> None:
    """Any counts, ranks without tokens and ranks without rows included."""
    whole = make_layer(D, CONFIG)
    x = torch.randn(sum(lengths), 1, D, generator=torch.Generator().manual_seed(1))
    if favourite is not None:
        x[..., 0] = 1.0
        with torch.no_grad():
            whole.router.weight[:, 0] = 0.0
            # The second visit goes to a neighbour, so at least all other ranks but one get no rows.
            whole.router.weight[favourite, 0] = 30.0
            whole.router.weight[favourite ^ 1, 0] = 20.0
    expected = work(whole, x.clone().requires_grad_())
    wire = Wire(len(lengths))
    layers = [shard(whole, ThreadExchange(wire, rank)) for rank in range(wire.size)]
    pieces = [piece.clone().requires_grad_() for piece in x.split(lengths)]
    with ThreadPoolExecutor(wire.size) as threads:
        found = list(threads.map(work, layers, pieces))
    assert wire.barrier.n_waiting == 0
    if favourite is not None:
        idle = [rank for rank in range(wire.size) if rank != favourite // (E // wire.size)]
        assert all(found[rank]["experts.w_in"].abs().max() == 0 for rank in idle)
    for name, value in expected.items():
        if name in ("y", "x") or name.startswith("experts"):
            mine = torch.cat([one[name] for one in found])
        else:
            mine = sum(one[name] for one in found)
        scale = value.abs().max()
        assert (mine - value).abs().max() <= 1e-5 * scale, name


@pytest.mark.parametrize("capacity", [0.5, 4.0], ids=["drops", "holds all"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_rows_of_fixed_number_change_nothing(ranks: int, capacity: float, make_layer: Callable[..., Any]) -> None:
    """One sequence on each rank: padded, here or spread over ranks, against ragged in one piece."""
    ragged = CONFIG.model_copy(update={"capacity": capacity})
    whole = make_layer(D, ragged)
    padded = make_layer(D, ragged.model_copy(update={"padded": True}))
    padded.load_state_dict(whole.state_dict())
    x = torch.randn(6, ranks, D, generator=torch.Generator().manual_seed(1))
    expected = work(whole, x.clone().requires_grad_())
    wire = Wire(ranks)
    layers = [padded] if ranks == 1 else [shard(padded, ThreadExchange(wire, rank)) for rank in range(ranks)]
    pieces = [x[:, rank : rank + 1].clone().requires_grad_() for rank in range(ranks)]
    with ThreadPoolExecutor(ranks) as threads:
        found = list(threads.map(work, layers, pieces))
    for name, value in expected.items():
        if name in ("y", "x"):
            mine = torch.cat([one[name] for one in found], dim=1)
        elif name.startswith("experts"):
            mine = torch.cat([one[name] for one in found])
        else:
            mine = sum(one[name] for one in found)
        assert (mine - value).abs().max() <= 1e-5 * value.abs().max(), name
