"""``manifest.json``: what a checkpoint holds and where, one line for each tensor, for programs and for people."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..base.errors import UserError
from ..base.files import digest, write_atomically
from .shards import BLOCK, DTYPES, BadCheckpoint, StoredTensor, Written

FORMAT = "moescale checkpoint"
SCHEMA = 2
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """A checkpoint's description: ``step``, the loop's own state, and every box of every tensor."""

    step: int
    extra: dict[str, Any]
    written: Written

    def save(self, folder: Path) -> None:
        """Write it into ``folder``; its last line is a checksum of the rest."""
        content = {
            "format": FORMAT,
            "schema": SCHEMA,
            "step": self.step,
            "extra": self.extra,
            "bytes_per_checksum": BLOCK,
            **self.written.as_json(),
        }
        write_atomically(folder / MANIFEST, _in_lines({**content, "checksum": digest(content)}))


def merged(parts: Iterable[Written]) -> Written:
    """What several writers have written, as one.

    Raises:
        ValueError: they disagree about a tensor, or together do not hold all of it once.
    """
    whole = Written({}, {})
    for part in parts:
        whole.shards.update(part.shards)
        for name, tensor in part.tensors.items():
            known = whole.tensors.setdefault(name, StoredTensor(tensor.shape, tensor.dtype, []))
            if (known.shape, known.dtype) != (tensor.shape, tensor.dtype):
                raise ValueError(f"{name} is {known.dtype} {known.shape} and {tensor.dtype} {tensor.shape}")
            known.boxes.extend(tensor.boxes)
    for name, tensor in whole.tensors.items():
        _check_whole(name, tensor)
    return whole


def load_manifest(folder: Path) -> Manifest:
    """The manifest in ``folder``, checked.

    Raises:
        BadCheckpoint: missing, damaged, or not one of ours.
        UserError: written by another version whose format this one does not read.
    """
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text())
        schema = int(content["schema"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadCheckpoint(f"{folder}: {MANIFEST} cannot be read or is not one of ours: {error!r}") from None
    if schema != SCHEMA:
        age = "newer than" if schema > SCHEMA else "older than"
        raise UserError(f"{folder}: checkpoint schema {schema} is {age} this version's {SCHEMA}, which reads no other")
    try:
        checksum = content.pop("checksum")
        if digest(content) != checksum:
            raise ValueError("its checksum is another: it was changed after it was written")
        manifest = Manifest(int(content["step"]), dict(content["extra"]), Written.from_json(content))
        _check_places(manifest.written)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadCheckpoint(f"{folder}: {MANIFEST} cannot be read or is not one of ours: {error!r}") from None
    return manifest


def _in_lines(content: dict[str, Any]) -> str:
    """JSON with a line for each key, and for each entry of the two large tables."""
    lines = []
    for key, value in content.items():
        if key in ("shards", "tensors"):
            entries = ",\n".join(f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in value.items())
            lines.append(f"{json.dumps(key)}: {{\n{entries}\n}}")
        else:
            lines.append(f"{json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _check_places(written: Written) -> None:
    """Every box lies inside a known file of this folder and inside its tensor."""
    for name, tensor in written.tensors.items():
        _check_whole(name, tensor)
        for box in tensor.boxes:
            size = math.prod(box.extent) * DTYPES[tensor.dtype].itemsize
            inside = all(s + e <= n for s, e, n in zip(box.start, box.extent, tensor.shape, strict=True))
            if not inside or box.offset + size > written.shards[box.shard].bytes:
                raise ValueError(f"{name}: a box lies outside")
            if Path(box.shard).name != box.shard or len(box.crc32) != -(-size // BLOCK):
                raise ValueError(f"{name}: {box.shard} is no file of a checkpoint, or lacks checksums")


def _check_whole(name: str, tensor: StoredTensor) -> None:
    stored = sum(math.prod(box.extent) for box in tensor.boxes)
    wanted = math.prod(tensor.shape)
    if stored != wanted:
        what = "in part only" if stored < wanted else "more than once"
        raise ValueError(f"{name} is stored {what}: {stored} of {wanted} elements")
