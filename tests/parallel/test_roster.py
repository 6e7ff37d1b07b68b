"""Whom rank 0 holds responsible, given what it heard when."""

import pytest

from moescale.parallel.failure import Patience
from moescale.parallel.roster import SETTLE, Roster

HOSTS = ["a", "a", "b", "b"]
PATIENCE = Patience(100.0)  # waits 80 s, then 20 s are left


@pytest.fixture
def roster() -> Roster:
    return Roster(HOSTS, PATIENCE, now=0.0)


def all_heard(roster: Roster, now: float, but: tuple[int, ...] = ()) -> None:
    for rank in range(len(HOSTS)):
        if rank not in but:
            roster.heard(rank, now)


def verdict(roster: Roster, now: float) -> tuple[tuple[int, ...], str]:
    found = roster.verdict(now)
    assert found is not None
    return found.ranks, found.text


def test_the_timeout_is_spent_whole() -> None:
    assert PATIENCE.wait + PATIENCE.margin == PATIENCE.wait + 2 * PATIENCE.settle == 100.0
    assert Patience(600.0).margin == 20.0  # finding out who it was does not take longer in large jobs
    assert all(Patience(t).beat < Patience(t).settle for t in (1.0, 10.0, 600.0, 3600.0))


def test_all_is_well(roster: Roster) -> None:
    for now in (1.0, 79.0):
        all_heard(roster, now)
        assert roster.verdict(now) is None


def test_deaths_of_one_accident_are_told_together(roster: Roster) -> None:
    roster.ended(3, 5.0)
    assert roster.verdict(5.0) is None
    roster.ended(2, 5.0 + SETTLE / 2)
    ranks, text = verdict(roster, 5.1 + SETTLE)
    assert ranks == (2, 3)
    assert text.startswith("ranks 2, 3 on b: ended without a word")


def test_what_a_rank_says_stands(roster: Roster) -> None:
    roster.failed(2, "MemoryError: no room", 5.0)
    roster.ended(2, 5.1)
    roster.failed(0, "ValueError: later", 5.2)
    assert verdict(roster, 6.0) == ((2,), "rank 2 on b: MemoryError: no room")


def test_a_death_explains_errors_elsewhere(roster: Roster) -> None:
    roster.failed(0, "SomeLibraryError: peer missing", 5.0)
    roster.ended(2, 5.1)
    assert verdict(roster, 6.0)[0] == (2,)


def test_one_who_takes_leave_is_not_missed(roster: Roster) -> None:
    roster.left(1)
    roster.ended(1, 5.0)
    all_heard(roster, 90.0, but=(1,))
    assert roster.verdict(95.0) is None


def test_silence(roster: Roster) -> None:
    all_heard(roster, 10.0)
    all_heard(roster, 90.0, but=(2, 3))
    assert roster.verdict(90.0) is None
    ranks, text = verdict(roster, 90.5)
    assert ranks == (2, 3)
    assert text == "ranks 2, 3 on b: not heard from for 80 s: stopped, powered off or cut off from the network"


def test_ranks_of_several_hosts(roster: Roster) -> None:
    all_heard(roster, 50.0, but=(1, 2))
    assert verdict(roster, 81.0)[1].startswith("rank 1 on a and rank 2 on b: ")


def complain(roster: Roster, *ranks: int, timed_out: bool) -> None:
    all_heard(roster, 80.0)
    for rank in ranks:
        roster.complained(rank, "RuntimeError: it said so", timed_out, 80.0)
    assert roster.verdict(80.0 + PATIENCE.settle / 2) is None


def test_alive_but_not_taking_part(roster: Roster) -> None:
    complain(roster, 0, 1, 3, timed_out=True)
    ranks, text = verdict(roster, 80.0 + PATIENCE.settle)
    assert ranks == (2,)
    assert text == "rank 2 on b: alive, but took no part in what the other ranks waited 80 s for"


def test_all_wait_for_one_another(roster: Roster) -> None:
    complain(roster, 0, 1, 2, 3, timed_out=True)
    ranks, text = verdict(roster, 95.0)
    assert ranks == (0, 1, 2, 3)
    assert "in different operations" in text


def test_a_broken_connection_between_the_living(roster: Roster) -> None:
    complain(roster, 1, timed_out=False)
    assert verdict(roster, 95.0) == (
        (1,),
        "rank 1 on a: lost its connection to a rank that is alive: RuntimeError: it said so",
    )


def test_one_left_early(roster: Roster) -> None:
    roster.left(3)
    complain(roster, 0, 1, 2, timed_out=False)
    assert verdict(roster, 95.0) == ((3,), "rank 3 on b: left before rank 0 on a was done")
