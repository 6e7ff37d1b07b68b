"""Reads pickled data without running any of it.

A pickle is a program: it names functions, and unpickling calls them. Here a name is only ever a name. What comes out
are lists, tuples, dictionaries, numbers and texts; what was an object becomes a `Record` of the class's name, the
arguments and the state that were stored. Names are compared with a list of those that a file of the kind needs, and any
other is refused, so that a hostile or unknown file is noticed rather than half understood. Nothing is imported or
called, and no class of the file's choosing comes to life.
"""

import io
import pickle
import pickletools
import struct
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ...base.errors import UserError


@dataclass(frozen=True)
class Name:
    """What a pickle calls by ``module.name``: a class or function, not looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class Record:
    """An object of a pickle: nothing but what was stored of it.

    Attributes:
        name: its class, or the function that would have made it.
        arguments: what that would have been called with.
        state: what would have been set on it afterwards; attributes by name for most classes.
    """

    name: Name
    arguments: tuple[Any, ...]
    state: Any = field(default_factory=dict)

    def get(self, attribute: str, default: Any = None) -> Any:
        """An attribute of its state."""
        return self.state.get(attribute, default) if isinstance(self.state, dict) else default


# Containers that become Python's own instead of records.
_CONTAINERS: Mapping[str, Callable[..., Any]] = {
    "torch.Size": tuple,
    "collections.OrderedDict": dict,
}
_OPCODES = [
    "PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "DUP", "GET", "BINGET", "LONG_BINGET", "PUT", "BINPUT",
    "LONG_BINPUT", "MEMOIZE", "NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1",
    "LONG4", "FLOAT", "BINFLOAT", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3",
    "EMPTY_LIST", "LIST", "APPEND", "APPENDS", "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS", "EMPTY_SET", "ADDITEMS",
    "FROZENSET", "GLOBAL", "STACK_GLOBAL", "REDUCE", "NEWOBJ", "BUILD", "BINPERSID",
]  # fmt: skip


class _Reader(pickle._Unpickler):
    """Python's own machine with fewer instructions, the calling ones replaced."""

    dispatch: ClassVar[dict[int, Callable[..., None]]] = {}
    stack: list[Any]

    def __init__(self, content: bytes, allowed: Container[str], persistent: Callable[[Any], Any] | None):
        super().__init__(io.BytesIO(content))
        self.allowed = allowed
        self.persistent = persistent

    def find_class(self, module: str, name: str) -> Any:
        found = Name(module, name)
        if str(found) not in self.allowed:
            raise _RefusedError(str(found))
        return found

    def persistent_load(self, pid: Any) -> Any:
        if self.persistent is None:
            raise _RefusedError("an object outside the file")
        return self.persistent(pid)

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = _made(self.stack[-1], arguments)

    def load_build(self) -> None:
        state = self.stack.pop()
        if not isinstance(self.stack[-1], Record):
            raise pickle.UnpicklingError("a state for what is no object")
        self.stack[-1].state = state


def _made(name: Any, arguments: Any) -> Any:
    if not isinstance(name, Name) or not isinstance(arguments, tuple):
        raise pickle.UnpicklingError("a call of what is no name")
    make = _CONTAINERS.get(str(name))
    return Record(name, arguments) if make is None else make(*arguments)


def _instructions() -> dict[int, Callable[..., None]]:
    codes = {opcode.name: opcode.code.encode("latin-1")[0] for opcode in pickletools.opcodes}
    known = {codes[name]: pickle._Unpickler.dispatch[codes[name]] for name in _OPCODES}
    ours = {"REDUCE": _Reader.load_reduce, "NEWOBJ": _Reader.load_reduce, "BUILD": _Reader.load_build}
    return known | {codes[name]: function for name, function in ours.items()}


_Reader.dispatch = _instructions()


class _RefusedError(Exception):
    """A name that is not on the list."""


def unpickle(
    content: bytes, allowed: Container[str], origin: str, persistent: Callable[[Any], Any] | None = None
) -> Any:
    """The data in a pickle.

    Args:
        allowed: full names, such as ``torch.Size``, that may occur.
        origin: names the file in errors.
        persistent: makes the value of a reference to what lies outside the pickle; without it none may occur.

    Raises:
        UserError: a name that is not allowed, or no pickle of data.
    """
    try:
        return _Reader(content, allowed, persistent).load()
    except _RefusedError as refused:
        raise UserError(
            f"{origin}: names {refused}, which such a file has no need of; nothing of it was run. "
            "Get the file from a source that you trust"
        ) from None
    except (pickle.UnpicklingError, EOFError, struct.error, MemoryError, RecursionError, OverflowError) as error:
        raise UserError(f"{origin}: not a pickle of plain data, or damaged: {error!r}") from None
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, UnicodeError, AssertionError) as error:
        raise UserError(f"{origin}: not a pickle of plain data, or damaged: {error!r}") from None
