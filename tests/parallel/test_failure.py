"""Telling what a rank suffers from what it does, by the errors that gloo really raises."""

import datetime
import threading
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from moescale.base.errors import UserError
from moescale.parallel.failure import Failure, LostRank, describe, lost_contact, name_ranks, timed_out

GROUP_TIMEOUT = datetime.timedelta(seconds=1)


def pair() -> list[dist.ProcessGroup]:
    """Two ends of a gloo group in this process."""
    store, ends = dist.HashStore(), {}

    def join(rank: int) -> None:
        ends[rank] = dist.ProcessGroupGloo(store, rank, 2, GROUP_TIMEOUT)

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [ends[0], ends[1]]


def error_of(collective: Callable[[], object]) -> Exception:
    with pytest.raises(RuntimeError) as raised:
        collective()
    return raised.value


def test_a_peer_that_does_not_come() -> None:
    mine, theirs = pair()
    error = error_of(lambda: mine.allreduce([torch.ones(3)]).wait())
    assert lost_contact(error)
    assert timed_out(error)
    again = error_of(lambda: mine.recv([torch.ones(3)], 1, 0).wait())
    assert lost_contact(again)
    del theirs


def test_a_peer_that_is_gone() -> None:
    mine, theirs = pair()
    del theirs
    error = error_of(lambda: mine.allreduce([torch.ones(3)]).wait())
    assert lost_contact(error)
    assert not timed_out(error)


def test_a_store_that_does_not_answer() -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=GROUP_TIMEOUT, wait_for_workers=False)
    assert lost_contact(error_of(lambda: store.wait(["nothing"], GROUP_TIMEOUT)))


@pytest.mark.parametrize(
    "text",
    [
        "rank 3 ended in the middle of an exchange through shared memory",
        "rank 0 of 2 in its expert group has waited 8 s (runtime.timeout) for the others in an exchange through MPI",
    ],
)
def test_exchanges_of_our_own(text: str) -> None:
    assert lost_contact(RuntimeError(text))


def test_faults_of_ones_own() -> None:
    for error in (
        MemoryError(),
        ValueError("NCCL"),
        RuntimeError("shapes differ"),
        OSError(28, "no space"),
        KeyError(),
    ):
        assert not lost_contact(error)
    assert lost_contact(LostRank(Failure((1,), "rank 1 is gone")))


def test_words() -> None:
    assert describe(RuntimeError("two\n  lines")) == "RuntimeError: two lines"
    assert describe(KeyboardInterrupt()) == "KeyboardInterrupt"
    assert describe(UserError("model.width (3): odd")) == "model.width (3): odd"
    assert name_ranks([0, 3, 1], ["a", "a", "b", "b"]) == "ranks 0, 1 on a and rank 3 on b"
