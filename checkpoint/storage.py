"""Checkpoints on disk: safetensors shards and a JSON manifest, written beside and renamed.

``checkpoints/step-00000100/`` holds the shards of every rank that stores anything and ``manifest.json`` with every
box (part, logical name, start, extent, place, checksums) and the loop's own state. The manifest is written last and
the folder renamed after it, so a folder with that name is whole. Loading runs no pickled code.
"""

import re
import secrets
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..base.files import sync
from ..models.names import Piece
from .manifest import Manifest, load_manifest, merged
from .reading import ShardReader, verify
from .shards import BadCheckpoint, StoredBox
from .writing import ShardWriter

_NAME = re.compile(r"step-(\d{8})$")


class Mismatch(BadCheckpoint):
    """A sound checkpoint of something else: it lacks a tensor, or has it in another shape."""


def folder_of(root: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` lies."""
    return root / f"step-{step:08d}"


def beside(root: Path, step: int, token: str) -> Path:
    """Where the checkpoint of ``step`` is written; ``token`` tells this attempt's from what a killed one left."""
    return root / f".{folder_of(root, step).name}.{token}.tmp"


def steps_in(root: Path) -> list[int]:
    """Steps with a checkpoint under ``root``, ascending."""
    if not root.is_dir():
        return []
    return sorted(int(m.group(1)) for entry in root.iterdir() if (m := _NAME.match(entry.name)))


def publish(root: Path, manifest: Manifest, folder: Path) -> Path:
    """Complete ``folder``, which holds the shards, with its manifest and give it its name; returns its new place."""
    manifest.save(folder)
    place = folder_of(root, manifest.step)
    # What is in the way is damaged, or was written from the same state: it would have been resumed from.
    shutil.rmtree(place, ignore_errors=True)
    folder.rename(place)
    sync(root)
    return place


def write_whole(root: Path, step: int, tensors: Iterable[tuple[str, str, Tensor]], extra: dict[str, Any]) -> Path:
    """Write a checkpoint of whole logical tensors, one after another; needs no ranks and holds one tensor at a time.

    Args:
        tensors: (part, logical name, values), in float32, bfloat16 or float16; parts are those of `state`. Without
            moments, whoever loads it starts with zero ones.

    Returns:
        The checkpoint's folder, which exists whole or not at all.

    Raises:
        ValueError: a tensor comes twice.
        OSError: the disk is full or not writable.
    """
    folder = beside(root, step, secrets.token_hex(4))
    folder.mkdir(parents=True)
    try:
        writer = ShardWriter(folder, "whole")
        for part, name, values in tensors:
            shape = tuple(values.shape)
            writer.add(part, name, shape, (0,) * len(shape), values)
        return publish(root, Manifest(step, extra, merged([writer.close()])), folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def prune(root: Path, keep: int, always: Iterable[int], every: int = 0) -> None:
    """Delete all but the latest ``keep`` checkpoints, those of steps in ``always`` and every ``every``-th step's."""
    kept = set(always) | set(steps_in(root)[-keep:])
    for step in steps_in(root):
        if step not in kept and not (every and step % every == 0):
            doomed = root / f".{folder_of(root, step).name}.old"
            folder_of(root, step).rename(doomed)  # a half-deleted folder must not look whole
            shutil.rmtree(doomed, ignore_errors=True)


def sweep(root: Path) -> None:
    """Delete what killed processes left half-written or half-deleted."""
    for pattern in (".step-*.tmp", ".step-*.old"):
        for leftover in root.glob(pattern):
            shutil.rmtree(leftover, ignore_errors=True)


class Checkpoint:
    """A checkpoint opened for reading. What is read is verified, and nothing else is read.

    Raises:
        BadCheckpoint: the manifest is missing, damaged or not one of ours, or a file is missing or has another size.
        UserError: written by another version.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        manifest = load_manifest(folder)
        self.step, self.extra = manifest.step, manifest.extra
        self._written = manifest.written
        self._reader = ShardReader(folder, manifest.written.shards)
        self._reader.check_sizes()

    def tensors(self, part: str) -> dict[str, tuple[int, ...]]:
        """Whole shapes of the logical tensors of ``part``, by name; empty when it holds none."""
        prefix = f"{part}/"
        tensors = self._written.tensors
        return {name.removeprefix(prefix): t.shape for name, t in tensors.items() if name.startswith(prefix)}

    def whole(self, part: str, name: str) -> Tensor:
        """One whole logical tensor, float32."""
        stored = self._written.tensors.get(f"{part}/{name}")
        shape = () if stored is None else stored.shape
        return self.box(part, Piece(name, shape, (0,) * len(shape), shape, lambda t: t))

    def box(self, part: str, piece: Piece) -> Tensor:
        """The values of ``piece``, float32; raises as `read` does."""
        values = torch.empty(piece.extent, dtype=torch.float32)
        self.read(part, piece, values)
        return values

    def read(self, part: str, piece: Piece, values: Tensor) -> None:
        """Fill ``values``, of the shape of ``piece``, from every stored box that overlaps it.

        Raises:
            Mismatch: this checkpoint holds no such tensor, or one of another shape.
            BadCheckpoint: a file is missing or damaged.
        """
        name = f"{part}/{piece.name}"
        stored = self._written.tensors.get(name)
        if stored is None:
            raise Mismatch(f"{self.folder}: holds no {name}")
        if stored.shape != piece.shape:
            raise Mismatch(f"{self.folder}: {name} has shape {list(stored.shape)}, the model needs {piece.shape}")
        filled = sum(self._copy_overlap(values, piece, stored.dtype, box) for box in stored.boxes)
        if filled != values.numel():
            raise BadCheckpoint(f"{self.folder}: boxes of {name} overlap or leave gaps")

    def _copy_overlap(self, values: Tensor, piece: Piece, dtype: str, box: StoredBox) -> int:
        source, target = [], []
        for mine, extent, theirs, size in zip(piece.start, piece.extent, box.start, box.extent, strict=True):
            first, last = max(mine, theirs), min(mine + extent, theirs + size)
            if first >= last:
                return 0
            source.append(slice(first - theirs, last - theirs))
            target.append(slice(first - mine, last - mine))
        rows = self._reader.rows(dtype, box, source[0].start, source[0].stop)
        part = rows[(slice(None), *source[1:])]
        values[tuple(target)] = part
        return part.numel()

    def verify(self) -> None:
        """Read and check all of it.

        Raises:
            BadCheckpoint: a file is missing or damaged.
        """
        verify(self.folder, self._written)
