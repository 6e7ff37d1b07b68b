"""Checkpoints on disk: safetensors shards and a JSON manifest, written beside and renamed.

``checkpoints/step-00000100/`` holds one shard for each rank that stores anything and ``manifest.json`` with every
box (part, logical name, start, extent, shard), every shard's size and CRC-32, and the loop's own state. The manifest
is written last and the folder renamed after it, so a folder with that name is whole. Loading runs no pickled code.
"""

import json
import os
import re
import shutil
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..base.errors import UserError
from ..base.files import sync, write_atomically
from ..models.names import Piece
from .state import Box

SCHEMA = 1
_NAME = re.compile(r"step-(\d{8})$")


class BadCheckpoint(Exception):
    """A checkpoint that is damaged or incomplete; the text says which file and how."""


def folder_of(root: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` lies."""
    return root / f"step-{step:08d}"


def steps_in(root: Path) -> list[int]:
    """Steps with a checkpoint under ``root``, ascending."""
    if not root.is_dir():
        return []
    return sorted(int(m.group(1)) for entry in root.iterdir() if (m := _NAME.match(entry.name)))


def save(root: Path, step: int, boxes: Iterable[Box], extra: dict[str, Any]) -> None:
    """Write the checkpoint of ``step``; all ranks call it together, and it exists when it returns.

    Raises:
        OSError: the disk is full or not writable; older checkpoints are untouched.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    beside = root / f".{folder_of(root, step).name}.tmp"
    if rank == 0:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
    _barrier(world)
    shard = f"rank-{rank:05d}.safetensors"
    described = _write_shard(beside / shard, boxes)
    gathered: list[Any] = [None] * world
    if world > 1:
        dist.all_gather_object(gathered, described)
    else:
        gathered = [described]
    if rank == 0:
        manifest = {"schema": SCHEMA, "step": step, "extra": extra, "shards": [s for s in gathered if s["boxes"]]}
        write_atomically(beside / "manifest.json", json.dumps(manifest))
        # Only a damaged checkpoint is ever in the way: a good one of this step would have been resumed from.
        shutil.rmtree(folder_of(root, step), ignore_errors=True)
        beside.rename(folder_of(root, step))
        sync(root)
    _barrier(world)


def write_whole(root: Path, step: int, tensors: Iterable[tuple[str, str, Tensor]], extra: dict[str, Any]) -> Path:
    """Write a checkpoint of whole logical tensors (part, name, values), without any ranks; returns its folder."""
    beside = root / f".{folder_of(root, step).name}.tmp"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    shards = []
    for number, (part, name, values) in enumerate(tensors):
        shape = tuple(values.shape)
        piece = Piece(name, shape, (0,) * len(shape), shape, lambda t: t)
        shards.append(_write_shard(beside / f"whole-{number:05d}.safetensors", [Box(part, piece, values)]))
    write_atomically(
        beside / "manifest.json", json.dumps({"schema": SCHEMA, "step": step, "extra": extra, "shards": shards})
    )
    beside.rename(folder_of(root, step))
    sync(root)
    return folder_of(root, step)


def _barrier(world: int) -> None:
    if world > 1:
        dist.barrier()


def _write_shard(path: Path, boxes: Iterable[Box]) -> dict[str, Any]:
    tensors: dict[str, Tensor] = {}
    described = []
    for box in boxes:
        key = f"{box.part}/{box.piece.name}@{','.join(map(str, box.piece.start))}"
        tensors[key] = box.values.contiguous()
        described.append({"key": key, "shape": box.piece.shape, "start": box.piece.start, "extent": box.piece.extent})
    if not tensors:
        return {"boxes": []}
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        raise _as_os_error(error, path) from error
    with path.open("rb+") as file:
        crc = _crc32(file)
        os.fsync(file.fileno())
    return {"file": path.name, "bytes": path.stat().st_size, "crc32": crc, "boxes": described}


def _as_os_error(error: SafetensorError, path: Path) -> Exception:
    """The system's own error inside one of safetensors'."""
    found = re.search(r"os error (\d+)", str(error))
    if found is None:
        return error
    number = int(found.group(1))
    return OSError(number, os.strerror(number), str(path))


def _crc32(file: BinaryIO) -> int:
    crc = 0
    while chunk := file.read(1 << 22):
        crc = zlib.crc32(chunk, crc)
    return crc


def prune(root: Path, keep: int, always: Iterable[int]) -> None:
    """Delete all but the latest ``keep`` checkpoints and those of the steps in ``always``."""
    kept = set(always) | set(steps_in(root)[-keep:])
    for step in steps_in(root):
        if step not in kept:
            doomed = root / f".{folder_of(root, step).name}.old"
            folder_of(root, step).rename(doomed)  # a half-deleted folder must not look whole
            shutil.rmtree(doomed, ignore_errors=True)


class Checkpoint:
    """A checkpoint opened for reading, verified.

    Raises:
        BadCheckpoint: manifest or shard missing, truncated or changed.
        UserError: written by a newer version.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            manifest = json.loads((folder / "manifest.json").read_text())
            schema, self.step, self.extra = int(manifest["schema"]), int(manifest["step"]), dict(manifest["extra"])
            shards = [(shard, list(shard["boxes"])) for shard in manifest["shards"]] if schema <= SCHEMA else []
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BadCheckpoint(f"{folder}: manifest.json cannot be read or is not one of ours: {error!r}") from None
        if schema > SCHEMA:
            raise UserError(f"{folder}: checkpoint schema {schema} is newer than this version's {SCHEMA}")
        self._boxes: dict[str, list[tuple[str, dict[str, Any]]]] = {}
        for shard, boxes in shards:
            self._verify(shard)
            for box in boxes:
                self._boxes.setdefault(box["key"].rsplit("@", 1)[0], []).append((shard["file"], box))
        self._open: dict[str, Any] = {}

    def _verify(self, shard: dict[str, Any]) -> None:
        path = self.folder / shard["file"]
        try:
            with path.open("rb") as file:
                crc = _crc32(file)
        except OSError as error:
            raise BadCheckpoint(f"{path}: {error.strerror}") from None
        if path.stat().st_size != shard["bytes"] or crc != shard["crc32"]:
            raise BadCheckpoint(f"{path}: damaged (its size or checksum is not the manifest's)")

    def tensors(self, part: str) -> dict[str, tuple[int, ...]]:
        """Logical name -> whole shape of everything stored of ``part``."""
        found = {}
        for key, boxes in self._boxes.items():
            stored_part, name = key.split("/", 1)
            if stored_part == part:
                found[name] = tuple(boxes[0][1]["shape"])
        return found

    def whole(self, part: str, name: str) -> Tensor:
        """A whole logical tensor, float32."""
        shape = self.tensors(part)[name]
        return self.box(part, Piece(name, shape, (0,) * len(shape), shape, lambda t: t))

    def box(self, part: str, piece: Piece) -> Tensor:
        """The values of ``piece``, put together from every stored box that overlaps it."""
        name = f"{part}/{piece.name}"
        if name not in self._boxes:
            raise BadCheckpoint(f"{self.folder}: holds no {name}")
        values = torch.empty(piece.extent, dtype=torch.float32)
        filled = 0
        for file, stored in self._boxes[name]:
            if tuple(stored["shape"]) != piece.shape:
                raise BadCheckpoint(f"{self.folder}: {name} has shape {stored['shape']}, the model needs {piece.shape}")
            filled += self._copy_overlap(values, piece, file, stored)
        if filled != values.numel():
            raise BadCheckpoint(f"{self.folder}: {name} is stored in part only")
        return values

    def _copy_overlap(self, values: Tensor, piece: Piece, file: str, stored: dict[str, Any]) -> int:
        source, target = [], []
        for mine, extent, theirs, size in zip(
            piece.start, piece.extent, stored["start"], stored["extent"], strict=True
        ):
            first, last = max(mine, theirs), min(mine + extent, theirs + size)
            if first >= last:
                return 0
            source.append(slice(first - theirs, last - theirs))
            target.append(slice(first - mine, last - mine))
        part = self._file(file).get_slice(stored["key"])[tuple(source)]
        values[tuple(target)] = part
        return part.numel()

    def _file(self, name: str) -> Any:
        if name not in self._open:
            try:
                self._open[name] = safe_open(self.folder / name, framework="pt")
            except SafetensorError as error:
                raise BadCheckpoint(f"{self.folder / name}: {error}") from None
        return self._open[name]


def latest_good(root: Path) -> tuple[Checkpoint | None, list[str]]:
    """The latest undamaged checkpoint under ``root``, and what was wrong with later ones."""
    complaints: list[str] = []
    for step in reversed(steps_in(root)):
        try:
            return Checkpoint(folder_of(root, step)), complaints
        except BadCheckpoint as error:
            complaints.append(str(error))
    return None, complaints
