"""Ranks that arrive, and those that differ, object or stay away: threads over a real store."""

import datetime
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist

from moescale.base.errors import UserError
from moescale.parallel.failure import LostRank
from moescale.parallel.roll_call import Arrival, call_roll

Arrive = Callable[..., list[Any]]


@pytest.fixture
def arrive() -> Arrive:
    """``arrive({rank: Arrival}, world)``: what each rank of ``world`` that is there gets or raises, in one store."""

    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def all_arrive(arrivals: dict[int, Arrival], world: int, timeout: float = 30) -> list[Any]:
        patience = datetime.timedelta(seconds=timeout)
        results: dict[int, Any] = {}

        def take_part(rank: int, arrival: Arrival) -> None:
            store = dist.TCPStore("127.0.0.1", server.port, timeout=patience, wait_for_workers=False)
            try:
                results[rank] = call_roll(store, rank, world, f"host{rank // 2}", arrival, timeout)
            except (UserError, LostRank) as error:
                results[rank] = error

        threads = [threading.Thread(target=take_part, args=item) for item in arrivals.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [results[rank] for rank in sorted(results)]

    return all_arrive


FACTS = {"training.seed": 3, "version of torch": "2.13", "data.domains.words.files": ["a", "b"]}


def texts(results: list[Any], kind: type[Exception]) -> str:
    """What all ranks say alike."""
    assert all(isinstance(result, kind) for result in results), results
    (text,) = {str(result) for result in results}
    return text


def test_all_alike(arrive: Arrive) -> None:
    rolls = arrive({rank: Arrival(dict(FACTS)) for rank in range(3)}, 3)
    assert [roll.hosts for roll in rolls] == [["host0", "host0", "host1"]] * 3
    rolls[1].store.set("said", "by rank 1")
    assert all(roll.store.get("said") == b"by rank 1" for roll in rolls)


def test_a_restart_does_not_hear_its_forerunner(arrive: Arrive) -> None:
    """torchrun keeps its store when it starts its ranks again."""
    other = {0: Arrival(dict(FACTS)), 1: Arrival({**FACTS, "training.seed": 4})}
    for _ in range(2):
        assert "training.seed is 4" in texts(arrive(other, 2), UserError)
    same = {rank: Arrival(dict(FACTS)) for rank in range(2)}
    first, second = arrive(same, 2), arrive(same, 2)
    first[0].store.set("address", "of a process that is gone")
    assert not second[1].store.check(["address"])


def test_differences_are_named_everywhere(arrive: Arrive) -> None:
    arrivals = {rank: Arrival(dict(FACTS)) for rank in range(4)}
    arrivals[2] = Arrival({**FACTS, "training.seed": 4, "version of torch": "2.14"})
    arrivals[3] = Arrival({key: value for key, value in FACTS.items() if key != "training.seed"})
    lines = texts(arrive(arrivals, 4), UserError).splitlines()
    assert lines == [
        "ranks differ from rank 0 on host0; start all of them with one configuration and one installation:",
        '  rank 2 on host1: training.seed is 4, rank 0 has 3; version of torch is "2.14", rank 0 has "2.13"',
        "  rank 3 on host1: training.seed is absent, rank 0 has 3",
    ]


def test_many_differences_are_counted(arrive: Arrive) -> None:
    facts = {f"key{number:02d}": 0 for number in range(12)}
    other = Arrival(dict.fromkeys(facts, 1))
    text = texts(arrive({0: Arrival(facts), 1: other}, 2), UserError)
    assert "key07 is 1" in text
    assert "key08" not in text
    assert text.endswith("and 4 more")


@pytest.mark.parametrize("objecting", [0, 1])
def test_an_objection_reaches_all(arrive: Arrive, objecting: int) -> None:
    arrivals = {rank: Arrival(dict(FACTS)) for rank in range(2)}
    arrivals[objecting] = Arrival(objection="no such corpus")
    assert texts(arrive(arrivals, 2), UserError) == f"rank {objecting} on host0: no such corpus"


def test_one_objection_of_all_is_said_once(arrive: Arrive) -> None:
    assert texts(arrive({rank: Arrival(objection="bad folder") for rank in range(3)}, 3), UserError) == "bad folder"


def test_who_stays_away_is_named(arrive: Arrive) -> None:
    results = arrive({0: Arrival(), 2: Arrival()}, 4, timeout=1)
    text = texts(results, LostRank)
    assert text == "rank 1, 3 did not arrive within 1 s; 2 of 4 ranks did, on host0, host1"
    assert results[0].failure.ranks == (1, 3)


def test_without_rank_0(arrive: Arrive) -> None:
    assert texts(arrive({1: Arrival()}, 2, timeout=1), LostRank).startswith("rank 0 said nothing within 1 s")
