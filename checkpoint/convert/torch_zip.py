"""What `torch.save` writes, read in place: a zip of a pickle and of each storage's bytes, nothing compressed.

For whole files (Megatron's ``common.pt``) and for the many small ones inside a shard of a distributed checkpoint. The
pickle goes through the allow-list of unpickle.py; the bytes of a tensor stay in the file until somebody copies them.
"""

import io
import mmap
import zipfile
from collections.abc import Container
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...base.errors import UserError
from ..checksum import crc32
from .unpickle import Name, Record, unpickle

ELEMENT_BYTES = {
    "Double": 8, "Float": 4, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Short": 2, "Char": 1, "Byte": 1, "Bool": 1,
}  # fmt: skip
TENSOR_NAMES = {
    "torch._utils._rebuild_tensor_v2",
    "collections.OrderedDict",
    *(f"torch.{kind}Storage" for kind in ELEMENT_BYTES),
}
_LOCAL_HEADER = 30  # bytes before the name; the lengths of name and extra field end it


@dataclass(frozen=True)
class Storage:
    """A reference of the pickle to bytes of the zip: element kind and the entry's number."""

    kind: str
    key: str


@dataclass(frozen=True)
class Layout:
    """A tensor inside a file: ``array`` views its bytes, ``[*shape, bytes of an element]``; ``kind`` of its storage."""

    array: Any
    kind: str

    def box(self, slices: tuple[slice, ...], dtype: torch.dtype) -> Tensor:
        """A copy of a part of it."""
        return torch.from_numpy(np.array(self.array[slices], order="C")).view(dtype).squeeze(-1)


class TorchZip:
    """One zip inside a mapped file.

    Args:
        content: the mapped file.
        start, length: where in it the zip lies.
        origin: names the place in errors.

    Raises:
        UserError: not such a zip.
    """

    def __init__(self, content: mmap.mmap, start: int, length: int, origin: str):
        self.origin, self.content, self.start, self.length = origin, content, start, length
        if start < 0 or length <= 0 or start + length > len(content):
            raise UserError(f"{origin}: bytes {start} to {start + length} lie outside the file ({len(content)}): cut?")
        try:
            self.zip = zipfile.ZipFile(_Window(content, start, length))
        except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError) as error:
            raise self._bad(error) from None
        entries = {entry.filename.partition("/")[2]: entry for entry in self.zip.infolist()}
        if "data.pkl" not in entries:
            raise self._bad("no data.pkl in it")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values()):
            raise self._bad("compressed, which torch.save never does")
        self.entries = entries
        if "byteorder" in entries and self._read("byteorder") != b"little":
            raise UserError(f"{origin}: written by a big-endian machine, which is not supported")

    def _bad(self, why: object) -> UserError:
        return UserError(f"{self.origin}: damaged, or not what torch.save writes ({why})")

    def _read(self, name: str) -> bytes:
        entry = self.entries[name]
        if entry.file_size > self.length:
            raise self._bad(f"{name} is longer than the whole")
        try:
            return self.zip.read(entry)
        except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError, RuntimeError, EOFError) as error:
            raise self._bad(error) from None

    def data(self, allowed: Container[str]) -> Any:
        """The pickled value; storages in it are `Storage`, everything else as `unpickle` makes it."""
        return unpickle(self._read("data.pkl"), allowed, self.origin, self._storage)

    def _storage(self, reference: Any) -> Storage:
        match reference:
            case ("storage", Name() as kind, str() as key, str(), int()):
                return Storage(kind.name.removesuffix("Storage"), key)
        raise self._bad(f"a reference to {reference!r}")

    def tensor(self) -> tuple[Layout, zipfile.ZipInfo, int]:
        """The single tensor that was saved: (its layout, its storage's zip entry, where bytes start)."""
        value = self.data(TENSOR_NAMES)
        match value:
            case Record(
                arguments=(Storage() as storage, int() as offset, tuple() as shape, tuple() as strides, bool(), *_)
            ) if f"data/{storage.key}" in self.entries:
                entry = self.entries[f"data/{storage.key}"]
                first = self._first_byte(entry)
                return self._layout(storage.kind, offset, shape, strides, first, entry), entry, first
        raise self._bad("no tensor in it")

    def _first_byte(self, entry: zipfile.ZipInfo) -> int:
        """Where in the file an entry's bytes start."""
        header = self.start + entry.header_offset
        lengths = self.content[header + _LOCAL_HEADER - 4 : header + _LOCAL_HEADER]
        first = header + _LOCAL_HEADER + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
        if entry.header_offset < 0 or first + entry.file_size > self.start + self.length:
            raise self._bad(f"{entry.filename} ends behind the end")
        return first

    def _layout(
        self,
        kind: str,
        offset: int,
        shape: tuple[Any, ...],
        strides: tuple[Any, ...],
        first: int,
        entry: zipfile.ZipInfo,
    ) -> Layout:
        size = ELEMENT_BYTES.get(kind)
        numbers = (offset, *shape, *strides)
        if size is None or not all(type(n) is int and n >= 0 for n in numbers) or len(shape) != len(strides):
            raise self._bad("a tensor of no sensible shape")
        storage = memoryview(self.content)[first : first + entry.file_size]
        try:
            array = np.ndarray(
                (*shape, size), np.uint8, storage, offset=offset * size, strides=(*(n * size for n in strides), 1)
            )
        except (ValueError, TypeError, OverflowError) as error:
            raise self._bad(error) from None
        return Layout(array, kind)

    def check(self, entry: zipfile.ZipInfo, first: int) -> None:
        """Compare an entry's bytes with the CRC-32 that the zip holds.

        Raises:
            UserError: they differ.
        """
        if crc32(memoryview(self.content)[first : first + entry.file_size]) != entry.CRC:
            raise UserError(f"{self.origin}: damaged: its bytes are not those that were written (CRC-32)")


class _Window(io.RawIOBase):
    """A part of a mapped file as a file of its own."""

    def __init__(self, content: mmap.mmap, start: int, length: int):
        super().__init__()
        self.content, self.start, self.length, self.place = content, start, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.place, io.SEEK_END: self.length}[whence]
        if place < 0:
            raise ValueError(f"seek to {place}")
        self.place = place
        return place

    def readinto(self, buffer: Any) -> int:
        count = max(min(len(buffer), self.length - self.place), 0)
        first = self.start + self.place
        buffer[:count] = self.content[first : first + count]
        self.place += count
        return count


def map_file(path: Any) -> mmap.mmap:
    """A file mapped into memory for reading.

    Raises:
        UserError: it cannot be read, or is empty.
    """
    try:
        with open(path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
