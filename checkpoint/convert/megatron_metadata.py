"""What the ``.metadata`` of a torch distributed checkpoint says: each tensor's shape, dtype and where its boxes lie.

It is read by unpickle.py. Every number in it is checked against the others and against the files' sizes, so that
nothing later reads outside a file or makes room for what no file can hold.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...base.errors import UserError
from .torch_zip import ELEMENT_BYTES
from .unpickle import Name, Record, unpickle

METADATA = ".metadata"
_DCP = "torch.distributed.checkpoint"
KINDS = {  # torch dtype: (kind of storage, safetensors' spelling)
    "float64": ("Double", "F64"),
    "float32": ("Float", "F32"),
    "float16": ("Half", "F16"),
    "bfloat16": ("BFloat16", "BF16"),
    "int64": ("Long", "I64"),
    "int32": ("Int", "I32"),
    "int16": ("Short", "I16"),
    "int8": ("Char", "I8"),
    "uint8": ("Byte", "U8"),
    "bool": ("Bool", "BOOL"),
}
PATH_NAMES = {f"{module}.{kind}" for module in ("pathlib", "pathlib._local") for kind in ("PosixPath", "PurePosixPath")}
METADATA_NAMES = {
    *(
        f"{_DCP}.metadata.{name}"
        for name in (
            "Metadata",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "_MEM_FORMAT_ENCODING",
            "MetadataIndex",
            "StorageMeta",
        )
    ),
    *(f"{_DCP}.filesystem.{name}" for name in ("_StorageInfo", "_StoragePrefix")),
    # Plans that Megatron-core keeps so that it need not make them anew.
    *(f"{_DCP}.planner.{name}" for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")),
    *(f"megatron.core.dist_checkpointing.strategies.torch.{name}" for name in ("MCoreSavePlan", "MCoreMetadata")),
    "torch.Size",
    "torch.serialization._get_layout",
    *(f"torch.{name}" for name in KINDS),
    *PATH_NAMES,
}


@dataclass(frozen=True)
class Chunk:
    """A stored box of a tensor: where it starts, its shape, and the bytes of its file."""

    start: tuple[int, ...]
    extent: tuple[int, ...]
    file: str
    offset: int
    length: int


@dataclass
class Global:
    """A tensor of the checkpoint.

    Attributes:
        dtype: torch's name, such as ``bfloat16``.
        cells: its chunks by index in all but the last two dimensions, so that finding one stays cheap.
    """

    shape: tuple[int, ...]
    dtype: str
    cells: dict[tuple[int, ...], list[Chunk]] = field(default_factory=dict)

    @property
    def spelling(self) -> str:
        """The dtype as safetensors spells it."""
        return KINDS[self.dtype][1]

    @property
    def kind(self) -> str:
        """The dtype as the name of a storage."""
        return KINDS[self.dtype][0]

    def leading(self) -> Iterator[tuple[int, ...]]:
        """Every index in all but the last two dimensions, in row-major order."""
        return itertools.product(*(range(n) for n in self.shape[:-2]))


def read_metadata(folder: Path) -> tuple[dict[str, Global], list[str]]:
    """(tensors by global name, names of stored objects that are no tensors) of the checkpoint in ``folder``.

    Raises:
        UserError: missing, hostile, damaged, or it contradicts the files beside it.
    """
    path = folder / METADATA
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    metadata = unpickle(content, METADATA_NAMES, str(path))
    try:
        return _Parser(folder, _expect(metadata, "Metadata")).parse()
    except (_MalformedError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not a distributed checkpoint's metadata, or damaged: {error}") from None


class _MalformedError(Exception):
    """Metadata whose pickle is harmless and whose content is not what it should be."""


def _expect(value: Any, name: str) -> Record:
    if not isinstance(value, Record) or value.name.name != name:
        raise _MalformedError(f"{value!r:.80} where a {name} belongs")
    return value


def _sizes(value: Any) -> tuple[int, ...]:
    if not isinstance(value, tuple) or not all(type(n) is int and n >= 0 for n in value):
        raise _MalformedError(f"{value!r:.80} where a shape belongs")
    return value


class _Parser:
    def __init__(self, folder: Path, metadata: Record):
        self.metadata = metadata
        self.sizes = {entry.name: entry.stat().st_size for entry in folder.iterdir() if entry.is_file()}
        self.tensors: dict[str, Global] = {}
        self.extents: dict[str, dict[tuple[int, ...], tuple[int, ...]]] = {}
        self.elements: dict[str, int] = {}

    def parse(self) -> tuple[dict[str, Global], list[str]]:
        objects = []
        for name, stored in dict(self.metadata.get("state_dict_metadata")).items():
            if not isinstance(name, str) or not isinstance(stored, Record):
                raise _MalformedError(f"{name!r:.80}: {stored!r:.80}")
            if stored.name.name == "BytesStorageMetadata":
                objects.append(name)
            else:
                self._tensor(name, _expect(stored, "TensorStorageMetadata"))
        for index, place in dict(self.metadata.get("storage_data")).items():
            if _expect(index, "MetadataIndex").get("fqn") in self.tensors:
                self._chunk(index, _expect(place, "_StorageInfo"))
        for name, tensor in self.tensors.items():
            if self.elements[name] != math.prod(tensor.shape):
                raise _MalformedError(
                    f"{name} has {math.prod(tensor.shape)} elements, its boxes hold {self.elements[name]}"
                )
        return self.tensors, objects

    def _tensor(self, name: str, stored: Record) -> None:
        properties = _expect(stored.get("properties"), "TensorProperties").state
        dtype = properties[0] if isinstance(properties, tuple) and properties else None
        if not isinstance(dtype, Name) or dtype.name not in KINDS:
            raise _MalformedError(f"{name} has the dtype {dtype}")
        self.tensors[name] = Global(_sizes(stored.get("size")), dtype.name)
        chunks = [_expect(chunk, "ChunkStorageMetadata") for chunk in list(stored.get("chunks"))]
        self.extents[name] = {_sizes(chunk.get("offsets")): _sizes(chunk.get("sizes")) for chunk in chunks}
        self.elements[name] = 0

    def _chunk(self, index: Record, place: Record) -> None:
        """Note where a box of a tensor lies."""
        name, file, start = index.get("fqn"), place.get("relative_path"), _sizes(index.get("offset"))
        extent = self.extents[name].get(start)
        shape = self.tensors[name].shape
        if extent is None:
            raise _MalformedError(f"{name} has no box at {list(start)}")
        if not len(start) == len(extent) == len(shape) or any(
            first + n > whole for first, n, whole in zip(start, extent, shape, strict=True)
        ):
            raise _MalformedError(f"{name}: a box of {list(extent)} at {list(start)} in {list(shape)}")
        if place.get("transform_descriptors"):
            raise _MalformedError(
                f"{name} is stored through {place.get('transform_descriptors')}, which is not supported"
            )
        offset, length = _sizes((place.get("offset"), place.get("length")))
        if file not in self.sizes:
            raise _MalformedError(f"{name} lies in {file!r}, and there is no such file beside")
        if offset + length > self.sizes[file]:
            raise _MalformedError(f"{file} is {self.sizes[file]} bytes long and {name} ends at {offset + length}: cut?")
        elements = math.prod(extent)
        if elements * ELEMENT_BYTES[self.tensors[name].kind] > length:
            raise _MalformedError(f"{name}: a box of {list(extent)} in {length} bytes")
        self.elements[name] += elements
        chunk = Chunk(start, extent, file, offset, length)
        if elements:
            for cell in itertools.product(*(range(s, s + n) for s, n in zip(start[:-2], extent[:-2], strict=True))):
                self.tensors[name].cells.setdefault(cell, []).append(chunk)
