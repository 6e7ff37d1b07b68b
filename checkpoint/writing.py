"""Writing boxes into shards, one after another, without holding any."""

import json
import os
import struct
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .shards import BLOCK, DTYPES, HEADER, Abandoned, BadCheckpoint, Shard, StoredBox, StoredTensor, Written, crc32

LARGEST = 1 << 30  # bytes of tensors in a file; a single tensor may be larger
FLUSH = 32 << 20  # bytes written after which the disk is set to work
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_SAFETENSORS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


class ShardWriter:
    """Writes boxes into ``PREFIX-000.safetensors`` and so on, and reads back what it has written.

    One helper thread computes checksums while the next box is written, one waits until a finished file is on the disk.

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
        self._batch: list[tuple[list[StoredBox], StoredBox, memoryview]] = []
        self._batch_bytes = 0
        self._unsettled: list[tuple[list[StoredBox], StoredBox]] = []
        self._checksums: Future[list[tuple[str, ...]]] | None = None
        self._on_the_way: list[Future[None]] = []
        self._helpers = ThreadPoolExecutor(2)

    def add(self, part: str, name: str, shape: tuple[int, ...], start: tuple[int, ...], values: Tensor) -> None:
        """Write ``values``, the box at ``start`` of a logical tensor of ``shape``."""
        dtype, extent, key = _NAMES[values.dtype], tuple(values.shape), f"{part}/{name}"
        tensor = self._written.tensors.setdefault(key, StoredTensor(shape, dtype, []))
        if (tensor.shape, tensor.dtype) != (shape, dtype):
            raise ValueError(f"{key}: boxes differ in shape or dtype: {tensor.shape} {tensor.dtype}, {shape} {dtype}")
        entry = key if extent == shape else f"{key}@{','.join(map(str, start))}"
        data = _bytes_of(values)
        if self._open is not None and not self._open.has_room(entry, extent, len(data)):
            self._finish()
        if self._open is None:
            self._open = _OpenShard(self._folder / f"{self._prefix}-{len(self._written.shards):03d}.safetensors")
        offset = self._open.enter(entry, _SAFETENSORS[dtype], extent, len(data))
        self._write(data)
        self._batch.append((tensor.boxes, StoredBox(start, extent, self._open.path.name, offset, ()), data))
        self._batch_bytes += len(data)
        if self._batch_bytes >= BLOCK:
            self._hand_over()

    def close(self) -> Written:
        """Finish the last file; everything is on the disk when this returns."""
        self._hand_over()
        self._settle()
        self._finish()
        for file in self._on_the_way:
            file.result()
        self._helpers.shutdown()
        return self._written

    def _hand_over(self) -> None:
        """Have the checksums of the boxes since the last time computed; no more than two such batches are ever held."""
        self._settle()
        self._unsettled = [(boxes, box) for boxes, box, _ in self._batch]
        self._checksums = self._helpers.submit(_checksums, [data for *_, data in self._batch])
        self._batch, self._batch_bytes = [], 0

    def _settle(self) -> None:
        if self._checksums is not None:
            for (boxes, box), crcs in zip(self._unsettled, self._checksums.result(), strict=True):
                boxes.append(replace(box, crc32=crcs))
            self._checksums = None

    def _write(self, data: memoryview) -> None:
        assert self._open is not None
        for first in range(0, len(data), BLOCK):
            if self._stop.is_set():
                raise Abandoned
            self._open.write(data[first : first + BLOCK])

    def _finish(self) -> None:
        if self._open is not None:
            self._written.shards[self._open.path.name] = self._open.finish()
            self._on_the_way.append(self._helpers.submit(self._open.force))
            self._open = None


class _OpenShard:
    """A file that is being written: room for the header, then the boxes."""

    def __init__(self, path: Path):
        self.path = path
        self._file = path.open("x+b", buffering=0)
        self._entries: dict[str, dict[str, Any]] = {}
        self._entries_bytes = len("{}")
        self._end = self._done = self._at_work = HEADER  # of what was entered, written, sent to the disk
        self._pending = bytearray()
        self._back = bytearray(BLOCK)

    def has_room(self, entry: str, extent: tuple[int, ...], size: int) -> bool:
        return self._end - HEADER + size <= LARGEST and self._entries_bytes + _room(entry, extent) <= HEADER - 8

    def enter(self, entry: str, dtype: str, extent: tuple[int, ...], size: int) -> int:
        """Take a box into the header; returns its place."""
        place = self._end
        self._entries[entry] = {
            "dtype": dtype,
            "shape": extent,
            "data_offsets": [place - HEADER, place - HEADER + size],
        }
        self._entries_bytes += _room(entry, extent)
        self._end += size
        return place

    def write(self, data: memoryview) -> None:
        """Write what comes next, small pieces together."""
        if self._pending or len(data) < BLOCK:
            self._pending += data
        else:
            self._put_and_check(data)
        if len(self._pending) >= BLOCK:
            self.flush()

    def flush(self) -> None:
        pending, self._pending = self._pending, bytearray()
        self._put_and_check(memoryview(pending))

    def _put_and_check(self, data: memoryview) -> None:
        """Write ``data`` and see that it comes back."""
        place = self._done
        self._put(place, data)
        back = self._back if len(data) == BLOCK else bytearray(len(data))
        if os.preadv(self._file.fileno(), [back], place) != len(data) or back != data:
            raise BadCheckpoint(f"{self.path}: what was written at {place} came back different")
        self._done += len(data)
        if self._done - self._at_work > FLUSH:
            # The system begins to write this to the disk now, while the next blocks come, and not at the end.
            os.posix_fadvise(self._file.fileno(), self._at_work, self._done - self._at_work, os.POSIX_FADV_DONTNEED)
            self._at_work = self._done

    def finish(self) -> Shard:
        """Write the header."""
        self.flush()
        text = json.dumps(self._entries, separators=(",", ":")).encode()
        header = struct.pack("<Q", HEADER - 8) + text.ljust(HEADER - 8)
        self._put(0, memoryview(header))
        return Shard(self._end, crc32(header))

    def _put(self, place: int, data: memoryview) -> None:
        done = 0
        while done < len(data):
            done += os.pwrite(self._file.fileno(), data[done:], place + done)

    def force(self) -> None:
        """Wait until it is on the disk."""
        os.fsync(self._file.fileno())
        self._file.close()


def _room(entry: str, extent: tuple[int, ...]) -> int:
    """Bytes that a box takes in a header, at most."""
    return len(entry) + len(str(extent)) + 80  # names of the fields, places, punctuation


def _checksums(boxes: list[memoryview]) -> list[tuple[str, ...]]:
    return [tuple(crc32(data[first : first + BLOCK]) for first in range(0, len(data), BLOCK)) for data in boxes]


def _bytes_of(values: Tensor) -> memoryview:
    flat = values.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]
