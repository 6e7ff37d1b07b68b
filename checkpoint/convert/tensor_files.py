"""Safetensors files on disk, read tensor by tensor and written as a stream: a few tensors in memory at a time.

The format is eight bytes of header length, a JSON header with each tensor's dtype, shape and offsets, then the bytes
(https://github.com/huggingface/safetensors). Its own ``save_file`` wants all tensors of a file at once.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...base.errors import UserError
from ..checksum import bytes_of, crc32, crc32_of
from .formats import DType, Stored

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
SHARD_BYTES = 4 << 30
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
SPELLING: dict[DType, str] = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
Item = TypeVar("Item")
Result = TypeVar("Result")


def ahead(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """``work`` of each item, in order; the next one's is done by another thread while the caller uses this one's."""
    with ThreadPoolExecutor(1) as thread:
        waiting: Future[Result] | None = None
        for item in items:
            following = thread.submit(work, item)
            if waiting is not None:
                yield waiting.result()
            waiting = following
        if waiting is not None:
            yield waiting.result()


def cast(tensor: Tensor, spelling: str, name: str) -> Tensor:
    """``tensor`` in another dtype.

    Raises:
        UserError: a finite value has no finite neighbour there (fp16 ends at 65504).
    """
    converted = tensor.to(DTYPES[spelling])
    if spelling == "F16" and not torch.equal(converted.isfinite(), tensor.isfinite()):
        raise UserError(f"--dtype fp16: {name} holds values beyond 65504; use bf16 or fp32")
    return converted


class TensorFiles:
    """The tensors of a folder: one file, or several with an index.

    Raises:
        UserError: missing, damaged or not safetensors, or the index and the files disagree; names the file.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        names = _file_names(folder)
        self._files: dict[str, Any] = {}
        self._place: dict[str, str] = {}
        self.stored: dict[str, Stored] = {}
        for file in names:
            self._open(file)
        if (folder / INDEX).is_file():
            self._check_index()

    def _open(self, file: str) -> None:
        path = self.folder / file
        try:
            handle = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: not a whole safetensors file: {error}") from None
        self._files[file] = handle
        for name in handle.keys():  # noqa: SIM118  (a handle is no dictionary)
            if name in self._place:
                raise UserError(f"{name} stands in {self._place[name]} and in {file} of {self.folder}")
            part = handle.get_slice(name)
            self._place[name] = file
            self.stored[name] = Stored(tuple(part.get_shape()), part.get_dtype())

    def _check_index(self) -> None:
        for name, file in _index(self.folder).items():
            if self._place.get(name) != file:
                raise UserError(f"{self.folder / INDEX}: promises {name} in {file}, which does not hold it")

    def read(self, name: str) -> Tensor:
        """A whole tensor, in its stored dtype.

        Raises:
            UserError: a dtype that is no plain floating-point one: names it.
        """
        dtype = self.stored[name].dtype
        if dtype not in DTYPES:
            raise UserError(f"{name} is stored as {dtype}; {', '.join(DTYPES)} can be converted, quantised weights not")
        return self._raw(name)

    def checksum(self, name: str) -> int:
        """CRC-32 of a tensor's bytes, whatever its dtype."""
        return crc32_of(self._raw(name))

    def _raw(self, name: str) -> Tensor:
        tensor: Tensor = self._files[self._place[name]].get_tensor(name)
        return tensor


def _file_names(folder: Path) -> list[str]:
    if (folder / INDEX).is_file():
        return sorted(set(_index(folder).values()))
    if (folder / SINGLE).is_file():
        return [SINGLE]
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    if pickled:
        raise UserError(f"{folder}: holds {pickled[0]} and no safetensors; a pickle runs code, so it is not read")
    raise UserError(f"{folder}: holds neither {SINGLE} nor {INDEX}")


def _index(folder: Path) -> dict[str, str]:
    try:
        found = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / INDEX}: cannot be read: {error!r}") from None
    if not isinstance(found, dict) or not all(isinstance(f, str) and Path(f).name == f for f in found.values()):
        raise UserError(f"{folder / INDEX}: weight_map must name a file of the same folder for each tensor")
    return found


class StreamedFile:
    """A safetensors file whose tensors, known by shape, are written one after the other.

    Use as a context manager. Every planned tensor must be written, in the planned order.
    """

    def __init__(self, path: Path, planned: Mapping[str, Stored]):
        self.path = path
        self._planned = dict(planned)
        self._left = list(self._planned)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, stored in self._planned.items():
            size = _size(stored)
            header[name] = {"dtype": stored.dtype, "shape": stored.shape, "data_offsets": [offset, offset + size]}
            offset += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # tensors start at a multiple of their size
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, tensor: Tensor) -> int:
        """Write the next tensor; returns its CRC-32."""
        expected = self._left.pop(0)
        stored = self._planned[name]
        if name != expected or tuple(tensor.shape) != stored.shape or tensor.dtype != DTYPES[stored.dtype]:
            raise RuntimeError(f"{self.path}: {name} {tuple(tensor.shape)} {tensor.dtype} is not what was planned")
        data = bytes_of(tensor)
        self._file.write(data)
        return crc32(data)

    def __enter__(self) -> "StreamedFile":
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        if kind is None and self._left:
            raise RuntimeError(f"{self.path}: {self._left[0]} was planned and not written")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def _size(stored: Stored) -> int:
    return math.prod(stored.shape) * DTYPES[stored.dtype].itemsize


def shards_of(planned: Mapping[str, Stored], limit: int = SHARD_BYTES) -> dict[str, dict[str, Stored]]:
    """Files for ``planned`` tensors, in order, each of at most ``limit`` bytes or of a single tensor."""
    groups: list[dict[str, Stored]] = []
    used = 0
    for name, stored in planned.items():
        if not groups or used + _size(stored) > limit:
            groups.append({})
            used = 0
        groups[-1][name] = stored
        used += _size(stored)
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{n:05d}-of-{len(groups):05d}.safetensors": group for n, group in enumerate(groups, 1)}


def index_of(shards: Mapping[str, Mapping[str, Stored]]) -> str:
    """Text of the index file of several shards."""
    total = sum(_size(stored) for group in shards.values() for stored in group.values())
    places = {name: file for file, group in shards.items() for name in group}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=1) + "\n"
