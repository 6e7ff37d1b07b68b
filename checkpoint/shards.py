"""What lies in the files of a checkpoint: boxes of tensors, with a checksum for every four megabytes of them.

Checksums are of blocks, so that whoever reads a part of a box checks that part and reads no more. The files are
safetensors, which any program that knows these can open; here they are read by the offsets in the manifest.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..base.files import write_atomically
from .checksum import crc32

BLOCK = 4 << 20  # bytes that a checksum covers; a box's last block is shorter
HEADER = 128 << 10  # bytes in front of the tensors, so that these can be written before all of them are known
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
            "shards": {name: vars(shard) for name, shard in self.shards.items()},
            "tensors": {
                name: {"shape": tensor.shape, "dtype": tensor.dtype, "boxes": [vars(box) for box in tensor.boxes]}
                for name, tensor in self.tensors.items()
            },
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


def checksums(data: memoryview) -> tuple[str, ...]:
    """Of each block of ``data``, as they stand in the manifest."""
    return tuple(f"{crc32(data[first : first + BLOCK]):08x}" for first in range(0, len(data), BLOCK))
