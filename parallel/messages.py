"""The messages of the watch: JSON objects, one a line, over TCP."""

import json
import socket
from typing import Any

LONGEST = 1 << 20  # bytes of a line; more comes from a stranger

Message = dict[str, Any]


def encode(kind: str, **content: Any) -> bytes:
    return json.dumps({"kind": kind, **content}).encode() + b"\n"


class Lines:
    """Cuts a stream of bytes into messages."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[Message]:
        """The messages that ``data`` completes.

        Raises:
            ValueError: this is not our protocol.
        """
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > LONGEST:
            raise ValueError("a line without end")
        messages = [json.loads(line) for line in lines]
        if not all(isinstance(message, dict) and "kind" in message for message in messages):
            raise ValueError("not a message")
        return messages


def listen(backlog: int) -> socket.socket:
    """A listening socket on every interface, on a free port."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=backlog)
    return socket.create_server(("", 0), backlog=backlog)


def reachable_address(master: str) -> str:
    """How other hosts reach this one, given an address that all of them can reach.

    ``master`` itself where it is this host's; else the address from which this host speaks to it.
    """
    mine = address_towards(master)
    return master if mine == socket.getaddrinfo(master, 1, type=socket.SOCK_DGRAM)[0][4][0] else mine


def address_towards(other: str) -> str:
    """The address from which this host speaks to ``other``."""
    family, _, _, _, target = socket.getaddrinfo(other, 1, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)  # sends nothing: chooses a route
        return str(probe.getsockname()[0])
