"""The exchange in two levels is the flat one: its arithmetic for any shape, and with real ranks."""

import subprocess
import sys
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moescale.parallel.exchange.plan import Moves
from moescale.parallel.exchange.two_level import two_level_moves

Row = tuple[int, int, int]  # who sent it, to whom, which of those
Counts = list[list[int]]  # rows from each rank to each


def carry_out(
    moves: list[Moves], buffers: list[list[Row]], ranks: Callable[[int], list[int]]
) -> list[list[Row | None]]:
    """What every rank holds after its moves; ``ranks(r)`` are the members of r's group."""
    wire: dict[tuple[int, int], deque[list[Row]]] = defaultdict(deque)
    for rank, (mine, rows) in enumerate(zip(moves, buffers, strict=True)):
        assert mine.leaving == len(rows)
        for segment in mine.sends:
            wire[rank, ranks(rank)[segment.peer]].append(rows[segment.first : segment.first + segment.rows])
    made: list[list[Row | None]] = [[None] * mine.arriving for mine in moves]
    for rank, mine in enumerate(moves):
        for segment in mine.receives:
            arriving = wire[ranks(rank)[segment.peer], rank].popleft()
            assert len(arriving) == segment.rows
            made[rank][segment.first : segment.first + segment.rows] = arriving
    assert not any(wire.values())
    return made


def moves_of_all(counts: Counts, local: int) -> tuple[list[Moves], list[Moves]]:
    """Each rank's moves inside its node and between nodes."""
    world = len(counts)
    nodes = world // local
    both = []
    for rank in range(world):
        node, place = divmod(rank, local)
        passing = [[counts[node * local + peer][m * local + place] for m in range(nodes)] for peer in range(local)]
        both.append(two_level_moves(counts[rank], passing, [row[rank] for row in counts], local))
    return [inside for inside, _ in both], [between for _, between in both]


@st.composite
def spread_counts(draw: st.DrawFn) -> tuple[int, Counts]:
    local, nodes = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    world = local * nodes
    row = st.lists(st.integers(0, 3), min_size=world, max_size=world)
    return local, draw(st.lists(row, min_size=world, max_size=world))


@given(spread_counts())
def test_two_steps_bring_every_row_where_the_flat_exchange_does(shape: tuple[int, Counts]) -> None:
    local, counts = shape
    world = len(counts)
    given_rows = [
        [(rank, peer, number) for peer in range(world) for number in range(counts[rank][peer])] for rank in range(world)
    ]
    wanted = [[(peer, rank, n) for peer in range(world) for n in range(counts[peer][rank])] for rank in range(world)]

    def node(rank: int) -> list[int]:
        return [rank // local * local + place for place in range(local)]

    def across(rank: int) -> list[int]:
        return list(range(rank % local, world, local))

    inside, between = moves_of_all(counts, local)
    passing = carry_out(inside, given_rows, node)
    made = carry_out(between, passing, across)  # type: ignore[arg-type]
    assert made == wanted
    back = carry_out([moves.reversed() for moves in between], made, across)  # type: ignore[arg-type]
    assert back == passing
    assert carry_out([moves.reversed() for moves in inside], back, node) == given_rows  # type: ignore[arg-type]


@given(spread_counts())
def test_as_many_rows_cross_the_network_in_fewer_messages(shape: tuple[int, Counts]) -> None:
    local, counts = shape
    world = len(counts)
    _, between = moves_of_all(counts, local)
    flat = [(r, p) for r in range(world) for p in range(world) if r // local != p // local and counts[r][p]]
    two_level = [
        (rank, segment)
        for rank, moves in enumerate(between)
        for segment in moves.sends
        if segment.peer != rank // local and segment.rows
    ]
    assert sum(segment.rows for _, segment in two_level) == sum(counts[r][p] for r, p in flat)
    assert len(two_level) <= min(len(flat), world * (world // local - 1))


def cases() -> Iterator[dict[str, torch.Tensor]]:
    """Rows from each rank for each expert of each rank, ``[P, P, E]``."""
    ranks, experts = 4, 3
    draw = torch.Generator().manual_seed(0)
    for _ in range(4):
        yield {"counts": torch.randint(0, 7, (ranks, ranks, experts), generator=draw)}
    sparse = torch.randint(0, 7, (ranks, ranks, experts), generator=draw)
    yield {"counts": sparse * (torch.rand(sparse.shape, generator=draw) < 0.2)}
    silent = torch.randint(1, 7, (ranks, ranks, experts), generator=draw)
    silent[1] = 0  # sends nothing
    silent[:, 2] = 0  # receives nothing
    yield {"counts": silent}
    yield {"counts": torch.zeros(ranks, ranks, experts, dtype=torch.int64)}


@pytest.mark.distributed
def test_real_ranks_as_two_nodes_of_two(tmp_path: Path) -> None:
    torch.save(list(cases()), tmp_path / "cases.pt")
    worker = Path(__file__).with_name("two_level_worker.py")
    command = [sys.executable, str(worker), str(tmp_path)]
    ranks = [
        subprocess.Popen([*command, str(rank), "4"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for rank in range(4)
    ]
    try:
        said = [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, output in zip(ranks, said, strict=True):
        assert rank.returncode == 0, output
