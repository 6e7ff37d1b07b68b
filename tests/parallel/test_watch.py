"""The watch over real connections: several ends in one process, some of them cut without a word."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import torch.distributed as dist

from moescale.parallel.failure import Failure, LostRank, Patience
from moescale.parallel.messages import LONGEST, Lines, encode, reachable_address
from moescale.parallel.watch import Watch

HOSTS = ["a", "b", "b"]
PATIENCE = Patience(5.0)
Start = Callable[..., list[Watch]]


@pytest.fixture
def start() -> Iterator[Start]:
    """``start()``: the watches of all ranks."""
    started: list[Watch] = []

    def start_all(patience: Patience = PATIENCE) -> list[Watch]:
        store = dist.HashStore()

        def one(rank: int) -> Watch:
            return Watch(store, rank, "127.0.0.1", HOSTS, patience, 60.0, lambda failure: None)

        with ThreadPoolExecutor(len(HOSTS)) as pool:
            started.extend(pool.map(one, range(len(HOSTS))))
        return started

    yield start_all
    for watch in reversed(started):
        watch.close()


def wait_for(condition: Callable[[], bool], seconds: float = 4.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def learns(watch: Watch, seconds: float = 4.0) -> Failure:
    wait_for(lambda: watch.failure is not None, seconds)
    assert watch.failure is not None
    return watch.failure


def test_a_rank_that_fails_tells_the_others(start: Start) -> None:
    watches = start()
    failure = watches[1].blame(MemoryError("no room"))
    assert failure == Failure((1,), "rank 1 on b: MemoryError: no room")
    assert [learns(watch) for watch in watches] == [failure] * 3


def test_who_lost_contact_learns_who_failed(start: Start) -> None:
    watches = start()
    error = RuntimeError("[/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4242")
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(watches[0].blame, error)
        time.sleep(0.1)
        watches[2].blame(ValueError("bad"))
        assert asking.result() == Failure((2,), "rank 2 on b: ValueError: bad")


def test_a_connection_that_ends_is_a_death(start: Start) -> None:
    watches = start()
    watches[2]._closing.set()  # it says nothing more
    watches[2]._connection.shutdown(socket.SHUT_RDWR)
    for watch in watches[:2]:
        failure = learns(watch)
        assert failure.ranks == (2,)
        assert failure.text.startswith("rank 2 on b: ended without a word")


def test_the_end_of_rank_0_is_known_too(start: Start) -> None:
    watches = start()
    server = watches[0]._server
    assert server is not None
    wait_for(lambda: len(server._callers) == len(HOSTS))  # one that is not accepted yet would not be cut off
    for caller in list(server._callers):
        caller.socket.shutdown(socket.SHUT_RDWR)
    for watch in watches[1:]:
        assert learns(watch).text.startswith("rank 0 on a: ended without a word")


def test_leaving_disturbs_nobody(start: Start) -> None:
    watches = start()
    watches[2].close()
    watches[0].close()
    time.sleep(0.5)
    assert all(watch.failure is None for watch in watches)


def test_silence_is_noticed(start: Start) -> None:
    patience = Patience(1.0)
    watches = start(patience)
    watches[1]._send = lambda message: None  # type: ignore[method-assign]
    began = time.monotonic()
    failure = learns(watches[0])
    assert patience.wait - 0.1 < time.monotonic() - began
    assert failure.ranks == (1,)
    assert "not heard from for 1 s" in failure.text


def test_strangers_are_not_heard(start: Start) -> None:
    watches = start()
    assert watches[0]._server is not None
    address = ("127.0.0.1", watches[0]._server.port)
    for said in (
        encode("hello", rank=1, token="guessed") + encode("failed", text="a lie"),
        b"GET / HTTP/1.1\r\n\r\n",
        b"[1]\n",
        b"x" * (2 * LONGEST),
    ):
        with socket.create_connection(address, timeout=5) as stranger, suppress(ConnectionError):
            stranger.sendall(said)
            while stranger.recv(1 << 16):
                pass  # beats, until the server closes
    time.sleep(0.5)
    assert all(watch.failure is None for watch in watches)


def test_nobody_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    store = dist.HashStore()
    store.set("address", json.dumps(["127.0.0.1", port, "token"]))
    with pytest.raises(LostRank, match=rf"rank 1 on b cannot reach rank 0 on a at 127.0.0.1:{port}"):
        Watch(store, 1, "127.0.0.1", HOSTS, PATIENCE, 60.0, lambda failure: None)
    assert threading.active_count() < 50


def test_messages_come_in_pieces() -> None:
    lines, found = Lines(), []
    for byte in encode("beat") + encode("failed", text="ü\n"):
        found += lines.feed(bytes([byte]))
    assert found == [{"kind": "beat"}, {"kind": "failed", "text": "ü\n"}]


def test_addresses_that_others_can_reach() -> None:
    assert reachable_address("127.0.0.1") == "127.0.0.1"
    assert reachable_address("localhost") == "localhost"
