"""The watch that ranks keep over one another, so that the end of one is an error with a name on all others.

Rank 0 serves (watch_server.py), every rank calls it and keeps the connection open. The system closes a connection
when its process ends, however that ends, so a death is known at once on every host; a host that is cut off or a
process that is stopped falls silent, which is noticed by the clock. torch's own store is no substitute: its requests
have no time limit of their own once a connection hangs.
"""

import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

import torch.distributed as dist

from ..base.errors import EXIT_FAILED
from .failure import DIED, Failure, LostRank, Patience, describe, lost_contact, name_ranks, silent_for, timed_out
from .messages import Lines, encode, reachable_address
from .watch_server import WatchServer

_ADDRESS = "address"


class Watch:
    """This rank's end of the watch.

    Args:
        store: where rank 0 tells how to call it; used here only.
        master: an address that every host can reach.
        hosts: of all ranks.
        grace: seconds that this rank has for coming to an end once a failure is known; then the process is ended.
        last_words: called with the failure before the process is ended that way.

    Raises:
        LostRank: rank 0 cannot be called.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        master: str,
        hosts: Sequence[str],
        patience: Patience,
        grace: float,
        last_words: Callable[[Failure], None],
    ):
        self._rank, self._hosts, self._patience = rank, hosts, patience
        self._grace, self._last_words = grace, last_words
        self._server: WatchServer | None = None
        if rank == 0:
            token = secrets.token_hex(16)
            self._server = WatchServer(hosts, patience, token)
            store.set(_ADDRESS, json.dumps([reachable_address(master), self._server.port, token]))
        host, port, token = json.loads(store.get(_ADDRESS))
        self._connection = self._call(host, port)
        self._send(encode("hello", rank=rank, token=token))
        self.failure: Failure | None = None
        self._known, self._closing = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._keep, name="watch", daemon=True)
        self._thread.start()

    def blame(self, error: BaseException) -> Failure:
        """Who ended the run, given what ended it on this rank; the other ranks learn it too.

        Waits for rank 0's verdict, at most the patience's margin.
        """
        if self.failure is None:
            text = describe(error)
            if lost_contact(error):
                self._send(encode("lost", text=text, timed_out=timed_out(error)))
            else:
                self._send(encode("failed", text=text))
            self._known.wait(self._patience.margin)
        return self.failure or Failure((self._rank,), f"{name_ranks([self._rank], self._hosts)}: {describe(error)}")

    def close(self) -> None:
        """Take leave. Rank 0 also ends the watch."""
        self._closing.set()
        self._send(encode("goodbye"))
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._thread.join(timeout=self._patience.margin)
        self._connection.close()
        if self._server is not None:
            self._server.close()

    def _call(self, host: str, port: int) -> socket.socket:
        try:
            connection = socket.create_connection((host, port), timeout=self._patience.wait)
        except OSError as error:
            raise LostRank(
                Failure(
                    (0,),
                    f"{name_ranks([self._rank], self._hosts)} cannot reach {name_ranks([0], self._hosts)} at "
                    f"{host}:{port}: {error}; hosts of one run must be able to connect to any port of each other",
                )
            ) from None
        connection.settimeout(self._patience.beat)
        return connection

    def _send(self, message: bytes) -> None:
        with suppress(OSError):  # rank 0 is gone or silent, which the thread notices as it reads
            self._connection.sendall(message)

    def _keep(self) -> None:
        """Beat and listen until the watch is closed, or until a failure is known and acted on."""
        lines, heard, beaten = Lines(), time.monotonic(), 0.0
        while self.failure is None and not self._closing.is_set():
            if time.monotonic() - beaten >= self._patience.beat:
                beaten = time.monotonic()
                self._send(encode("beat"))
            data = self._receive()
            if data is None:
                silence = time.monotonic() - heard
                if silence > self._patience.wait:
                    self._conclude(silent_for(silence))
                continue
            heard = time.monotonic()
            if not data and not self._closing.is_set():
                self._conclude(DIED)
            for message in lines.feed(data):
                if message["kind"] == "goodbye":
                    return
                if message["kind"] == "verdict":
                    self.failure = Failure(tuple(message["ranks"]), message["text"])
        if self.failure is not None:
            self._known.set()
            self._see_to_the_end(self.failure)

    def _receive(self) -> bytes | None:
        """What rank 0 has sent: nothing at its end, None when it is silent for a beat."""
        try:
            return self._connection.recv(1 << 16)
        except TimeoutError:
            return None
        except OSError:
            return b""

    def _conclude(self, cause: str) -> None:
        """Rank 0 cannot say who failed: it is the one."""
        self.failure = Failure((0,), f"{name_ranks([0], self._hosts)}: {cause}")

    def _see_to_the_end(self, failure: Failure) -> None:
        """End the process if its main thread does not: it may wait for a peer in a library, for ever."""
        if not self._closing.wait(self._grace):
            self._last_words(failure)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(EXIT_FAILED)
