"""Writing boxes into shards, one after another, without holding any."""

import json
import os
import struct
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .boxes import Held
from .checksum import bytes_of
from .shards import BLOCK, DTYPES, HEADER, Abandoned, BadCheckpoint, Shard, StoredBox, StoredTensor, Written, checksums

LARGEST = 1 << 30  # bytes of tensors in a file; a single tensor may be larger
FLUSH = 32 << 20  # bytes written after which the disk is set to work
TOGETHER = 1024  # pieces that the system takes in one call (IOV_MAX)
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_SAFETENSORS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


class ShardWriter:
    """Writes boxes into ``PREFIX-000.safetensors`` and so on, and reads back what it has written.

    A helper thread waits until a finished file is on the disk while the next one is written.

    Args:
        stop: when it is set, writing ends with `Abandoned`.

    Raises:
        OSError: the disk is full or not writable.
        BadCheckpoint: something came back different.
    """

    def __init__(self, folder: Path, prefix: str, stop: threading.Event | None = None):
        self._folder, self._prefix = folder, prefix
        self._stop = stop or threading.Event()
        self._written = Written({}, {})
        self._open: _OpenShard | None = None
        self._on_the_way: list[Future[None]] = []
        self._helper = ThreadPoolExecutor(1)

    def add(self, part: str, name: str, shape: tuple[int, ...], start: tuple[int, ...], values: Tensor) -> None:
        """Write ``values``, the box at ``start`` of a logical tensor of ``shape``."""
        self._add(f"{part}/{name}", shape, start, tuple(values.shape), values.dtype, bytes_of(values))

    def add_range(self, held: Held) -> None:
        """Write all boxes of a flat range; its bytes are cut without making a tensor of each."""
        flat, dtype = bytes_of(held.values), held.values.dtype
        for cut in held.cuts:
            piece = cut.piece
            data = cut.bytes_in(flat, dtype.itemsize)
            self._add(f"{held.part}/{piece.name}", piece.shape, piece.start, piece.extent, dtype, data)

    def _add(
        self,
        key: str,
        shape: tuple[int, ...],
        start: tuple[int, ...],
        extent: tuple[int, ...],
        kind: torch.dtype,
        data: memoryview,
    ) -> None:
        dtype = _NAMES[kind]
        tensor = self._written.tensors.get(key)
        if tensor is None:
            tensor = self._written.tensors[key] = StoredTensor(shape, dtype, [])
        if (tensor.shape, tensor.dtype) != (shape, dtype):
            raise ValueError(f"{key}: boxes differ in shape or dtype: {tensor.shape} {tensor.dtype}, {shape} {dtype}")
        entry = key if extent == shape else f"{key}@{','.join(map(str, start))}"
        room = len(entry) + 20 * len(extent) + 100  # in a header, at most: sizes and places have up to 18 digits
        if self._open is not None and not self._open.has_room(room, len(data)):
            self._finish()
        if self._open is None:
            self._open = _OpenShard(self._folder / f"{self._prefix}-{len(self._written.shards):03d}.safetensors")
        offset, sums = self._open.enter(entry, _SAFETENSORS[dtype], extent, len(data), room), checksums(data)
        tensor.boxes.append(StoredBox(start, extent, self._open.path.name, offset, sums))
        for first, known in zip(range(0, len(data), BLOCK), sums, strict=True):
            if self._stop.is_set():
                raise Abandoned
            self._open.write(data[first : first + BLOCK], known)

    def close(self) -> Written:
        """Finish the last file; everything is on the disk when this returns."""
        self._finish()
        for file in self._on_the_way:
            file.result()
        self._helper.shutdown()
        return self._written

    def _finish(self) -> None:
        if self._open is not None:
            self._written.shards[self._open.path.name] = self._open.finish()
            self._on_the_way.append(self._helper.submit(self._open.force))
            self._open = None


class _OpenShard:
    """A file that is being written: room for the header, then the boxes."""

    def __init__(self, path: Path):
        self.path = path
        self._file = path.open("x+b", buffering=0)
        self._entries: dict[str, dict[str, Any]] = {}
        self._entries_bytes = len("{}")
        self._end = self._done = self._at_work = HEADER  # of what was entered, written, sent to the disk
        self._pending: list[tuple[memoryview, str]] = []  # with their checksums
        self._pending_bytes = 0
        self._back = bytearray(2 * BLOCK)

    def has_room(self, room: int, size: int) -> bool:
        return self._end - HEADER + size <= LARGEST and self._entries_bytes + room <= HEADER - 8

    def enter(self, entry: str, dtype: str, extent: tuple[int, ...], size: int, room: int) -> int:
        """Take a box of ``size`` bytes into the header, where it needs ``room``; returns its place."""
        place = self._end
        self._entries[entry] = {
            "dtype": dtype,
            "shape": extent,
            "data_offsets": [place - HEADER, place - HEADER + size],
        }
        self._entries_bytes += room
        self._end += size
        return place

    def write(self, data: memoryview, known: str) -> None:
        """Write what comes next, at most a block, with its checksum; small pieces go together."""
        self._pending.append((data, known))
        self._pending_bytes += len(data)
        if self._pending_bytes >= BLOCK or len(self._pending) == TOGETHER:
            self._flush()

    def _flush(self) -> None:
        """Write what is pending and see that it comes back."""
        pending, size, place = self._pending, self._pending_bytes, self._done
        self._pending, self._pending_bytes = [], 0
        self._put(place, [data for data, _ in pending], size)
        back = memoryview(self._back)[:size]
        same, first = os.preadv(self._file.fileno(), [back], place) == size, 0
        for data, known in pending:
            same = same and checksums(back[first : first + len(data)]) == (known,)
            first += len(data)
        if not same:
            raise BadCheckpoint(f"{self.path}: what was written at {place} came back different")
        self._done += size
        if self._done - self._at_work > FLUSH:
            # The system begins to write this to the disk now, while the next blocks come, and not at the end.
            os.posix_fadvise(self._file.fileno(), self._at_work, self._done - self._at_work, os.POSIX_FADV_DONTNEED)
            self._at_work = self._done

    def finish(self) -> Shard:
        """Write the header."""
        if self._pending:
            self._flush()
        text = json.dumps(self._entries, separators=(",", ":")).encode()
        header = memoryview(struct.pack("<Q", HEADER - 8) + text.ljust(HEADER - 8))
        self._put(0, [header], HEADER)
        return Shard(self._end, *checksums(header))

    def _put(self, place: int, pieces: list[memoryview], size: int) -> None:
        done = os.pwritev(self._file.fileno(), pieces, place)
        if done < size:  # the disk is nearly full, or a signal came between
            rest = memoryview(b"".join(pieces))
            while done < size:
                done += os.pwrite(self._file.fileno(), rest[done:], place + done)

    def force(self) -> None:
        """Wait until it is on the disk."""
        os.fsync(self._file.fileno())
        self._file.close()
