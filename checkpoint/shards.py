"""Boxes of tensors in safetensors files, with a checksum for every four megabytes of them.

Checksums are of blocks, so that whoever reads a part of a box checks that part and reads no more. The files can be
opened by any program that knows safetensors; here they are read by the offsets in the manifest.
"""

import json
import math
import os
import struct
import threading
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..base.files import write_atomically

BLOCK = 4 << 20  # bytes that a checksum covers; a box's last block is shorter
LARGEST = 1 << 30  # bytes of tensors in a file; a single tensor may be larger
HEADER = 128 << 10  # bytes in front of the tensors, so that these can be written before all of them are known
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_SAFETENSORS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


class BadCheckpoint(Exception):
    """A checkpoint that is damaged or incomplete; the text says which file and how."""


class Abandoned(Exception):
    """Writing was given up because nobody waits for it any more."""


@dataclass(frozen=True)
class Shard:
    """One file: its size, and the CRC-32 of everything in front of the tensors."""

    bytes: int
    header: str


@dataclass(frozen=True)
class StoredBox:
    """Where a box of a logical tensor lies on the disk.

    Attributes:
        start: first index of the box in each dimension of the tensor.
        extent: shape of the box.
        shard: name of the file.
        offset: of its first byte in the file.
        crc32: of each block of its bytes.
    """

    start: tuple[int, ...]
    extent: tuple[int, ...]
    shard: str
    offset: int
    crc32: tuple[str, ...]


@dataclass
class StoredTensor:
    """A logical tensor: its whole shape, its dtype on the disk and the boxes that make it up."""

    shape: tuple[int, ...]
    dtype: str
    boxes: list[StoredBox]


@dataclass
class Written:
    """What one writer has written; ``tensors`` by part/name."""

    shards: dict[str, Shard]
    tensors: dict[str, StoredTensor]

    def as_json(self) -> dict[str, Any]:
        return {
            "shards": {name: asdict(shard) for name, shard in self.shards.items()},
            "tensors": {name: asdict(tensor) for name, tensor in self.tensors.items()},
        }

    def save(self, path: Path) -> None:
        """Write it to ``path``, which exists whole or not at all."""
        write_atomically(path, json.dumps(self.as_json()))

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Written":
        """Raises ``KeyError``, ``TypeError`` or ``ValueError`` when this is not what `as_json` gives."""
        shards = {str(name): Shard(int(s["bytes"]), str(s["header"])) for name, s in content["shards"].items()}
        return cls(shards, {str(name): _tensor_from(tensor) for name, tensor in content["tensors"].items()})


def _tensor_from(content: Mapping[str, Any]) -> StoredTensor:
    boxes = [
        StoredBox(_sizes(b["start"]), _sizes(b["extent"]), str(b["shard"]), int(b["offset"]), tuple(b["crc32"]))
        for b in content["boxes"]
    ]
    return StoredTensor(_sizes(content["shape"]), str(content["dtype"]), boxes)


def _sizes(values: Any) -> tuple[int, ...]:
    sizes = tuple(int(value) for value in values)
    if any(size < 0 for size in sizes):
        raise ValueError(f"negative size in {sizes}")
    return sizes


class ShardWriter:
    """Writes boxes into ``PREFIX-000.safetensors`` and so on, one after another, without holding any.

    Args:
        stop: when it is set, writing ends with `Abandoned`.

    Raises:
        OSError: the disk is full or not writable.
    """

    def __init__(self, folder: Path, prefix: str, stop: threading.Event | None = None):
        self._folder, self._prefix, self._stop = folder, prefix, stop
        self._written = Written({}, {})
        self._file: BinaryIO | None = None
        self._header: dict[str, Any] = {}
        self._header_bytes = 0
        self._end = 0

    def add(self, part: str, name: str, shape: tuple[int, ...], start: tuple[int, ...], values: Tensor) -> None:
        """Write ``values``, the box at ``start`` of a logical tensor of ``shape``."""
        dtype = _NAMES[values.dtype]
        extent = tuple(values.shape)
        key = f"{part}/{name}"
        entry_name = key if extent == shape else f"{key}@{','.join(map(str, start))}"
        entry_bytes = len(json.dumps({entry_name: self._entry(dtype, extent, 1 << 40)}))
        data = memoryview(values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        self._make_room(len(data), entry_bytes)
        assert self._file is not None
        offset = self._end
        self._header[entry_name] = self._entry(dtype, extent, len(data))
        self._header_bytes += entry_bytes
        self._end += len(data)
        box = StoredBox(start, extent, Path(self._file.name).name, offset, tuple(self._write(data)))
        tensor = self._written.tensors.setdefault(key, StoredTensor(shape, dtype, []))
        if (tensor.shape, tensor.dtype) != (shape, dtype):
            raise ValueError(f"{key}: boxes differ in shape or dtype: {tensor.shape} {tensor.dtype}, {shape} {dtype}")
        tensor.boxes.append(box)

    def close(self) -> Written:
        """Finish the last file; everything is on the disk when this returns."""
        self._finish()
        return self._written

    def _entry(self, dtype: str, extent: tuple[int, ...], size: int) -> dict[str, Any]:
        first = self._end - HEADER
        return {"dtype": _SAFETENSORS[dtype], "shape": extent, "data_offsets": [first, first + size]}

    def _make_room(self, size: int, entry_bytes: int) -> None:
        """Begin another file when the box or its entry does not fit into this one."""
        full = self._end - HEADER + size > LARGEST or self._header_bytes + entry_bytes > HEADER - 8
        if self._file is not None and self._header and full:
            self._finish()
        if self._file is None:
            path = self._folder / f"{self._prefix}-{len(self._written.shards):03d}.safetensors"
            self._file = path.open("xb")
            self._file.seek(HEADER)
            self._header, self._header_bytes, self._end = {}, 2, HEADER

    def _write(self, data: memoryview) -> Iterator[str]:
        """Write blocks; yields their checksums."""
        assert self._file is not None
        for first in range(0, len(data), BLOCK):
            if self._stop is not None and self._stop.is_set():
                raise Abandoned
            block = data[first : first + BLOCK]
            yield f"{zlib.crc32(block):08x}"
            self._file.write(block)

    def _finish(self) -> None:
        if self._file is None:
            return
        text = json.dumps(self._header, separators=(",", ":")).encode()
        header = struct.pack("<Q", HEADER - 8) + text.ljust(HEADER - 8)
        self._file.seek(0)
        self._file.write(header)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._written.shards[Path(self._file.name).name] = Shard(self._end, f"{zlib.crc32(header):08x}")
        self._file = None


class ShardReader:
    """Reads boxes of the files in ``folder``, checking every block that it reads."""

    def __init__(self, folder: Path, shards: Mapping[str, Shard]):
        self._folder, self._shards = folder, shards
        self._files: dict[str, BinaryIO] = {}
        self._scratch = bytearray()

    def check_sizes(self) -> None:
        """Every file is there and as long as it was; nothing of it is read.

        Raises:
            BadCheckpoint: one is not.
        """
        for name, shard in self._shards.items():
            path = self._folder / name
            try:
                size = path.stat().st_size
            except OSError as error:
                raise BadCheckpoint(f"{path}: {error.strerror}") from None
            if size != shard.bytes:
                raise BadCheckpoint(f"{path}: damaged ({size} bytes long instead of {shard.bytes})")

    def rows(self, dtype: str, box: StoredBox, first: int, last: int) -> Tensor:
        """Rows ``first`` to ``last`` of a box. The result is overwritten by the next call.

        Raises:
            BadCheckpoint: the file is missing, shorter than it was, or its bytes are not those that were written.
        """
        row = math.prod(box.extent[1:]) * DTYPES[dtype].itemsize
        begin = first * row // BLOCK * BLOCK
        end = min(-(-last * row // BLOCK) * BLOCK, box.extent[0] * row)
        data = self._read(box.shard, box.offset + begin, end - begin)
        for block, position in enumerate(range(0, end - begin, BLOCK), begin // BLOCK):
            if f"{zlib.crc32(data[position : position + BLOCK]):08x}" != box.crc32[block]:
                raise BadCheckpoint(
                    f"{self._folder / box.shard}: damaged (bytes {box.offset + block * BLOCK} and on are not those "
                    "that were written)"
                )
        wanted = data[first * row - begin : last * row - begin]
        return torch.frombuffer(wanted, dtype=DTYPES[dtype]).view(last - first, *box.extent[1:])

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _read(self, shard: str, offset: int, size: int) -> memoryview:
        file = self._open(shard)
        if len(self._scratch) < size:
            self._scratch = bytearray(size)
        data = memoryview(self._scratch)[:size]
        file.seek(offset)
        if file.readinto(data) != size:  # type: ignore[attr-defined]
            raise BadCheckpoint(f"{self._folder / shard}: damaged (it ends early)")
        return data

    def _open(self, shard: str) -> BinaryIO:
        if shard not in self._files:
            path, known = self._folder / shard, self._shards[shard]
            try:
                file = path.open("rb")
            except OSError as error:
                raise BadCheckpoint(f"{path}: {error.strerror}") from None
            self._files[shard] = file
            if f"{zlib.crc32(file.read(HEADER)):08x}" != known.header:
                raise BadCheckpoint(f"{path}: damaged (its header is not the one that was written)")
        return self._files[shard]


def verify(folder: Path, written: Written, stop: threading.Event | None = None) -> None:
    """Read everything that ``written`` names, and check it.

    Raises:
        BadCheckpoint: something is not what was written.
        Abandoned: ``stop`` was set.
    """
    reader = ShardReader(folder, written.shards)
    try:
        for tensor in written.tensors.values():
            for box in tensor.boxes:
                if stop is not None and stop.is_set():
                    raise Abandoned
                reader.rows(tensor.dtype, box, 0, box.extent[0])
    finally:
        reader.close()
