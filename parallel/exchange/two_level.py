"""An exchange in two steps: inside each node, then between nodes.

Let p = (n, l) be rank l of node n, of N nodes with L ranks each. Step 1, inside node n: (n, l) gives (n, k) the rows
that are meant for rank k of any node. Step 2, between ranks of equal place: (n, k) gives (m, k) what its node has for
it, in one message. So a rank sends N - 1 messages over the network instead of (N - 1) L, of L times the size; the
bytes between nodes are the same, and rows for other nodes cross their own node once more.

Between the steps rank (n, k) holds its rows by (m, l): node they go to, rank they came from. Then step 2 leaves them
by (n, l), the order of a flat exchange, and no row has to be sorted: step 1 only sends and receives in segments.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ...base.errors import UserError
from .plan import Moves, Plan, PlannedExchange, Segment, Transfer, move, start


class Level(PlannedExchange, Protocol):
    """An exchange that carries out any moves."""

    def plan(self, moves: Moves) -> Plan:
        """The plan for these moves."""


@dataclass(frozen=True)
class TwoLevelPlan:
    """Two plans, one behind the other."""

    first: Plan
    second: Plan

    @property
    def leaving(self) -> int:
        return self.first.leaving

    @property
    def arriving(self) -> int:
        return self.second.arriving

    def reversed(self) -> Self:
        return type(self)(self.second.reversed(), self.first.reversed())

    def start(self, rows_RD: Tensor, into_RD: Tensor) -> "TwoLevelTransfer":
        first = start(rows_RD, self.first)
        return TwoLevelTransfer(first, self.second.start(first.relay(), into_RD))


@dataclass
class TwoLevelTransfer:
    """The second transfer; the first is kept for what it reads."""

    first: Transfer
    second: Transfer

    def wait(self) -> Tensor:
        return self.second.wait()

    def relay(self) -> Tensor:
        return self.second.relay()


class TwoLevelExchange:
    """Exchange over a group whose ranks are spread evenly over nodes, neighbours together.

    Args:
        group: the ranks of all nodes.
        local: ranks of the group on each node, above 1 and below the group's size (see `two_level`).
        level: makes the exchange of a group inside a node, or between nodes.
    """

    def __init__(self, group: ProcessGroup, local: int, level: Callable[[ProcessGroup], Level]):
        ranks = dist.get_process_group_ranks(group)
        self.size, self.rank = len(ranks), dist.get_rank(group)
        self.local, self.nodes = local, len(ranks) // local
        node, place = divmod(self.rank, local)
        self._groups = [
            _subgroup(group, members) for members in (ranks[node * local : (node + 1) * local], ranks[place::local])
        ]
        self.inside, self.between = (level(subgroup) for subgroup in self._groups)

    def counts(self, sent_PE: Tensor) -> Tensor:
        nodes, local, experts = self.nodes, self.local, sent_PE.shape[1]
        by_place = sent_PE.view(nodes, local, experts).transpose(0, 1).reshape(local, -1)
        passing = self.inside.counts(by_place).view(local, nodes, experts)
        return self.between.counts(passing.transpose(0, 1).reshape(nodes, -1)).view(self.size, experts)

    def rows(self, rows_RD: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        (plan,) = self.plans([sent], [received], rows_RD.device)
        return move(rows_RD, plan)

    def plans(
        self, sent_CP: Sequence[Sequence[int]], received_CP: Sequence[Sequence[int]], device: torch.device
    ) -> list[Plan]:
        """As `PlannedExchange.plans`. Costs one message of C x N integers to each rank of the node."""
        sent = torch.tensor(sent_CP, device=device).view(len(sent_CP), self.nodes, self.local)
        passing = self.inside.counts(sent.permute(2, 0, 1).reshape(self.local, -1))
        passing_CLN = passing.view(self.local, len(sent_CP), self.nodes).transpose(0, 1).tolist()
        return [
            TwoLevelPlan(self.inside.plan(first), self.between.plan(second))
            for first, second in (
                two_level_moves(*counts, self.local) for counts in zip(sent_CP, passing_CLN, received_CP, strict=True)
            )
        ]

    def close(self) -> None:
        self.inside.close()
        self.between.close()
        for group in self._groups:
            dist.destroy_process_group(group)


def two_level(group: ProcessGroup, nodes: Sequence[int], level: Callable[[ProcessGroup], Level]) -> PlannedExchange:
    """The exchange of a group whose ranks are on ``nodes``: in two levels where there are two.

    Raises:
        UserError: some nodes hold more ranks of the group than others.
    """
    ranks_of_node = [len(list(ranks)) for _, ranks in itertools.groupby(nodes)]
    local = ranks_of_node[0]
    if set(ranks_of_node) != {local} or len(set(nodes)) != len(ranks_of_node):
        raise UserError(
            f"parallel.exchange (two_level) needs as many ranks of an expert group on each node, side by side; these "
            f"ranks are on the nodes {', '.join(map(str, nodes))}: change parallel.expert ({len(nodes)}), or take "
            "parallel.exchange=torch"
        )
    if local in (1, len(nodes)):
        return level(group)
    return TwoLevelExchange(group, local, level)


def two_level_moves(
    sent_P: Sequence[int], passing_LN: Sequence[Sequence[int]], received_P: Sequence[int], local: int
) -> tuple[Moves, Moves]:
    """What a rank sends and receives inside its node, and between nodes.

    Args:
        sent_P: rows for each rank of the group.
        passing_LN: rows that each rank of the node has for the ranks of our place on each node.
        received_P: rows from each rank of the group.
        local: ranks on a node.
    """
    nodes = len(sent_P) // local
    sends = tuple(
        Segment(rank % local, end - rows, rows)
        for rank, (rows, end) in enumerate(zip(sent_P, itertools.accumulate(sent_P), strict=True))
    )
    passing_NL = [passing_LN[place][node] for node in range(nodes) for place in range(local)]
    receives = tuple(
        Segment(cell % local, end - rows, rows)
        for cell, (rows, end) in enumerate(zip(passing_NL, itertools.accumulate(passing_NL), strict=True))
    )
    between = Moves.flat(_sums(passing_NL, local), _sums(received_P, local))
    return Moves(sends, receives, local), between


def _sums(rows: Sequence[int], count: int) -> list[int]:
    """Sums of ``count`` neighbours."""
    return [sum(rows[first : first + count]) for first in range(0, len(rows), count)]


def _subgroup(group: ProcessGroup, ranks: list[int]) -> ProcessGroup:
    """A group of some of a group's ranks, made by those alone, as patient as the group that it is part of."""
    kind = torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")
    patience = group._get_backend(kind).options._timeout
    return dist.new_group(ranks, timeout=patience, use_local_synchronization=True)
