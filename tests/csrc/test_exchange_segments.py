"""The C++ that posts sends and receives for NCCL, with mailboxes in NCCL's place: bytes come where they belong."""

from typing import Any

import pytest
import torch

from moescale.parallel.exchange.plan import Moves, Segment
from moescale.parallel.exchange.two_level import two_level_moves

WIDTH = 3  # int16 elements a row
SHAPES = [(1, 1), (1, 4), (2, 2), (2, 3), (3, 2), (4, 4)]  # nodes, ranks on each


def rows_of(counts_PP: torch.Tensor) -> list[torch.Tensor]:
    """Each rank's rows by peer; no two rows of the world are alike."""
    numbered = torch.arange(int(counts_PP.sum()) * WIDTH, dtype=torch.int16).view(-1, WIDTH)
    return list(numbered.split(counts_PP.sum(dim=1).tolist()))


def flat(counts_PP: torch.Tensor, rows: list[torch.Tensor]) -> list[torch.Tensor]:
    parts = [mine.split(sent.tolist()) for mine, sent in zip(rows, counts_PP, strict=True)]
    return [torch.cat([theirs[rank] for theirs in parts]) for rank in range(len(rows))]


def carried_out(programs: Any, moves: list[Moves], rows: list[torch.Tensor]) -> list[torch.Tensor]:
    """What each rank holds afterwards, under AddressSanitizer."""
    arrays = {
        "sizes": torch.tensor([[len(m.sends), len(m.receives), m.leaving, m.arriving] for m in moves]),
        "sends": table([segment for m in moves for segment in m.sends]),
        "receives": table([segment for m in moves for segment in m.receives]),
        "leaving": torch.cat(rows),
    }
    done = programs.run("exchange", "address", arrays, {"ranks": len(moves), "row_bytes": 2 * WIDTH, "seed": 0})
    assert done.status == 0, done.stderr
    arriving = [m.arriving for m in moves]
    return list(done.array("arriving", (sum(arriving), WIDTH), torch.int16).split(arriving))


def table(segments: list[Segment]) -> torch.Tensor:
    return torch.tensor([(s.peer, s.first, s.rows) for s in segments], dtype=torch.int64).view(-1, 3)


@pytest.mark.parametrize(("nodes", "local"), SHAPES)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_flat_and_two_level_moves_bring_the_same_rows(programs: Any, nodes: int, local: int, density: float) -> None:
    world = nodes * local
    draw = torch.Generator().manual_seed(world + nodes)
    counts_PP = torch.randint(0, 6, (world, world), generator=draw)
    counts_PP *= torch.rand(counts_PP.shape, generator=draw) < density
    counts, rows = counts_PP.tolist(), rows_of(counts_PP)
    wanted = flat(counts_PP, rows)
    one_step = [Moves.flat(counts[rank], [row[rank] for row in counts]) for rank in range(world)]
    assert all(map(torch.equal, carried_out(programs, one_step, rows), wanted))

    inside, between = [], []
    for rank in range(world):
        node, place = divmod(rank, local)
        passing = [[counts[node * local + peer][m * local + place] for m in range(nodes)] for peer in range(local)]
        both = two_level_moves(counts[rank], passing, [row[rank] for row in counts], local)
        inside.append(in_world(both[0], [node * local + peer for peer in range(local)], world))
        between.append(in_world(both[1], [m * local + place for m in range(nodes)], world))
    made = carried_out(programs, between, carried_out(programs, inside, rows))
    assert all(map(torch.equal, made, wanted))
    back = [[moves.reversed() for moves in step] for step in (between, inside)]
    returned = carried_out(programs, back[1], carried_out(programs, back[0], made))
    assert all(map(torch.equal, returned, rows))


def in_world(moves: Moves, members: list[int], world: int) -> Moves:
    """Moves among ``members`` as moves among all ranks."""
    sides = [
        tuple(Segment(members[segment.peer], segment.first, segment.rows) for segment in side)
        for side in (moves.sends, moves.receives)
    ]
    return Moves(sides[0], sides[1], world)


TWO = torch.tensor([[1, 2], [3, 1]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sends": (Segment(0, 0, 1), Segment(2, 1, 2))}, "a segment's peer is not in the group"),
        ({"sends": (Segment(0, 0, 1), Segment(1, 2, 2))}, "a segment lies outside the rows"),
        ({"sends": (Segment(0, -1, 1), Segment(1, 1, 2))}, "a segment lies outside the rows"),
        ({"sends": (Segment(0, 0, 2), Segment(1, 2, 1))}, "a rank's own rows differ in number"),
        ({"sends": (Segment(1, 0, 3),)}, "a rank's own rows differ in number"),
        ({"receives": (Segment(0, 0, 1), Segment(1, 1, 2))}, "the segments do not add up to the rows"),
    ],
)
def test_segments_that_cannot_be_are_refused(programs: Any, change: dict[str, Any], message: str) -> None:
    counts = TWO.tolist()
    moves = [Moves.flat(counts[rank], [row[rank] for row in counts]) for rank in range(2)]
    sizes = (moves[0].leaving, moves[0].arriving)
    broken = Moves(change.get("sends", moves[0].sends), change.get("receives", moves[0].receives), 2)
    arrays = {
        "sizes": torch.tensor([[len(broken.sends), len(broken.receives), *sizes], [2, 2, 4, 3]]),
        "sends": table([*broken.sends, *moves[1].sends]),
        "receives": table([*broken.receives, *moves[1].receives]),
        "leaving": torch.cat(rows_of(TWO)),
    }
    done = programs.run("exchange", "", arrays, {"ranks": 2, "row_bytes": 2 * WIDTH, "seed": 0})
    assert done.status == 1
    assert message in done.stderr
