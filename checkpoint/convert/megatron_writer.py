"""Writes what Megatron-core's ``dist_checkpointing.load`` reads, chunk by chunk, without Megatron.

The reader on Megatron's side takes any grid of boxes, so the layout of the ranks that will load it does not matter.
"""

import json
import os
import pickle
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from ..checksum import crc32_of
from .megatron_files import COMMON, CONFIG
from .megatron_metadata import METADATA

SHARD_BYTES = 1 << 30


class DistWriter:
    """A checkpoint being written into an empty folder; it is complete after `close`.

    Args:
        common: the content of ``common.pt``.
    """

    def __init__(self, folder: Path, common: dict[str, Any]):
        self.folder = folder
        self._tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        self._places: dict[MetadataIndex, _StorageInfo] = {}
        self._crc: dict[str, int] = {}
        self._file: BinaryIO | None = None
        self._shards = 0
        torch.save(common, folder / COMMON)
        described = {
            "sharded_backend": "torch_dist",
            "sharded_backend_version": 1,
            "common_backend": "torch",
            "common_backend_version": 1,
        }
        (folder / CONFIG).write_text(json.dumps(described))

    def add(self, name: str, shape: tuple[int, ...], start: tuple[int, ...], values: Tensor) -> None:
        """Write a box of the tensor ``name``; all of a tensor's boxes must be written, in row-major order.

        Args:
            values: in the box's shape.
        """
        values = values.contiguous()
        if values.untyped_storage().nbytes() != values.nbytes:
            values = values.clone()  # torch.save writes the whole storage of a view
        stored = self._tensors.setdefault(
            name, TensorStorageMetadata(TensorProperties(dtype=values.dtype), torch.Size(shape), [])
        )
        assert isinstance(stored, TensorStorageMetadata)
        place = self._append(values)
        self._places[MetadataIndex(name, start, len(stored.chunks))] = place
        stored.chunks.append(ChunkStorageMetadata(torch.Size(start), values.shape))
        self._crc[name] = crc32_of(values, self._crc.get(name, 0))

    def add_nothing(self, name: str) -> None:
        """An object that holds nothing, for what a loading model asks for by this name (its ``_extra_state``)."""
        self._tensors[name] = BytesStorageMetadata()
        self._places[MetadataIndex(name)] = self._append([None])

    def checksum(self, name: str) -> int:
        """CRC-32 of a tensor's bytes, row-major."""
        return self._crc[name]

    def close(self) -> None:
        """Write the metadata, and make everything durable."""
        self._end_shard()
        with (self.folder / METADATA).open("wb") as file:
            pickle.dump(Metadata(self._tensors, storage_data=self._places), file)
            file.flush()
            os.fsync(file.fileno())

    def _append(self, value: Any) -> _StorageInfo:
        if self._file is None:
            self._file = (self.folder / f"__0_{self._shards}.distcp").open("wb")
            self._shards += 1
        name, start = Path(self._file.name).name, self._file.tell()
        torch.save(value, self._file)
        place = _StorageInfo(name, start, self._file.tell() - start)
        if self._file.tell() >= SHARD_BYTES:
            self._end_shard()
        return place

    def _end_shard(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None
