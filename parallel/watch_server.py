"""Rank 0's end of the watch: hears every rank, and tells all of them who broke the run."""

import selectors
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field

from .failure import Failure, Patience
from .messages import Lines, Message, encode, listen
from .roster import Roster

LOOK = 0.1  # seconds between two looks at the clock


@dataclass(eq=False)
class _Caller:
    """A connection; ``rank`` is None until it has introduced itself."""

    socket: socket.socket
    lines: Lines = field(default_factory=Lines)
    rank: int | None = None


class WatchServer:
    """A thread that serves until it is closed.

    Args:
        hosts: of all ranks.
        token: what callers must know to be listened to.
    """

    def __init__(self, hosts: Sequence[str], patience: Patience, token: str):
        self._patience, self._token, self._world = patience, token, len(hosts)
        self._roster = Roster(hosts, patience, time.monotonic())
        self._listener = listen(backlog=self._world)
        self._callers: list[_Caller] = []
        self._verdict: Failure | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="watch server", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    def close(self) -> None:
        """Say goodbye to all ranks and end."""
        self._closing.set()
        self._thread.join(timeout=self._patience.margin)

    def _serve(self) -> None:
        with selectors.DefaultSelector() as selector, self._listener:
            selector.register(self._listener, selectors.EVENT_READ)
            next_beat = 0.0
            while not self._closing.is_set():
                for key, _ in selector.select(LOOK):
                    if key.data is None:
                        self._accept(selector)
                    elif not self._hear(key.data):
                        selector.unregister(key.fileobj)
                        self._forget(key.data)
                now = time.monotonic()
                if now >= next_beat:
                    next_beat = now + self._patience.beat
                    self._tell_all(encode("beat"))
                if self._verdict is None:
                    self._judge(now)
            self._tell_all(encode("goodbye"))
            for caller in self._callers:
                caller.socket.close()

    def _accept(self, selector: selectors.BaseSelector) -> None:
        with suppress(OSError):  # the caller has gone again
            connection, _ = self._listener.accept()
            connection.setblocking(False)
            caller = _Caller(connection)
            self._callers.append(caller)
            selector.register(connection, selectors.EVENT_READ, caller)

    def _hear(self, caller: _Caller) -> bool:
        """Take in what has come; False when the connection is at its end."""
        try:
            data = caller.socket.recv(1 << 16)
            messages = caller.lines.feed(data)
        except BlockingIOError:
            return True
        except (OSError, ValueError):
            return False
        return bool(data) and all(self._understand(caller, message) for message in messages)

    def _understand(self, caller: _Caller, message: Message) -> bool:
        now = time.monotonic()
        if caller.rank is None:
            rank = message.get("rank")
            if message.get("token") != self._token or not isinstance(rank, int) or not 0 <= rank < self._world:
                return False
            caller.rank = rank
        self._roster.heard(caller.rank, now)
        match message["kind"]:
            case "failed":
                self._roster.failed(caller.rank, message["text"], now)
            case "lost":
                self._roster.complained(caller.rank, message["text"], message["timed_out"], now)
            case "goodbye":
                self._roster.left(caller.rank)
        return True

    def _forget(self, caller: _Caller) -> None:
        self._callers.remove(caller)
        caller.socket.close()
        if caller.rank is not None:
            self._roster.ended(caller.rank, time.monotonic())

    def _judge(self, now: float) -> None:
        self._verdict = self._roster.verdict(now)
        if self._verdict is not None:
            self._tell_all(encode("verdict", **asdict(self._verdict)))

    def _tell_all(self, message: bytes) -> None:
        for caller in self._callers:
            with suppress(OSError):  # gone, or stopped with a full buffer: its own silence or end will tell
                caller.socket.sendall(message)
