"""Reading boxes out of shards: what is asked for and no more, verified."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from .shards import BLOCK, DTYPES, HEADER, BadCheckpoint, Shard, StoredBox, Written, checksums


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
        for block, found in enumerate(checksums(data), begin // BLOCK):
            if found != box.crc32[block]:
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
            if checksums(memoryview(file.read(HEADER))) != (known.header,):
                raise BadCheckpoint(f"{path}: damaged (its header is not the one that was written)")
        return self._files[shard]


def verify(folder: Path, written: Written) -> None:
    """Read everything that ``written`` names, and check it.

    Raises:
        BadCheckpoint: something is not what was written.
    """
    reader = ShardReader(folder, written.shards)
    try:
        for tensor in written.tensors.values():
            for box in tensor.boxes:
                reader.rows(tensor.dtype, box, 0, box.extent[0])
    finally:
        reader.close()
