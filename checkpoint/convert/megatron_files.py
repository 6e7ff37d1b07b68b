"""Megatron-core's distributed checkpoints on disk, read without Megatron and without running what they hold.

The ``torch_dist`` format is PyTorch's distributed checkpoint: ``.metadata`` says of each global tensor in which bytes
of which ``__RANK_N.distcp`` each box of it lies, each box as `torch.save` writes a tensor; ``common.pt`` holds what is
no tensor (the arguments of a run of Megatron-LM); ``metadata.json`` names the format.
"""

import itertools
import json
import mmap
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...base.errors import UserError
from ..checksum import crc32_of
from .megatron_metadata import KINDS, METADATA, PATH_NAMES, Chunk, read_metadata
from .torch_zip import TENSOR_NAMES, TorchZip, map_file

COMMON, CONFIG = "common.pt", "metadata.json"
# What megatron-core registers as safe for torch.load (its safe_globals.py), and dtypes.
COMMON_NAMES = {
    *TENSOR_NAMES,
    *(f"torch.{name}" for name in KINDS),
    *PATH_NAMES,
    "argparse.Namespace",
    "types.SimpleNamespace",
    "signal.Signals",
    "_io.BytesIO",
    "_codecs.encode",
    "numpy.ndarray",
    "numpy.dtype",
    "numpy.dtypes.UInt32DType",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "megatron.core.enums.ModelType",
    "megatron.core.optimizer.optimizer_config.OptimizerConfig",
    "megatron.core.transformer.enums.AttnBackend",
    "megatron.core.transformer.enums.CudaGraphScope",
    *(
        f"megatron.core.rerun_state_machine.{name}"
        for name in ("RerunDiagnostic", "RerunMode", "RerunState", "RerunErrorInjector", "RerunValidationStatus")
    ),
}


class DistCheckpoint:
    """A distributed checkpoint opened for reading; boxes are read when asked for.

    Attributes:
        tensors: by global name.
        objects: names of what is stored that is no tensor; never read.
        common: what ``common.pt`` holds, as `unpickle` makes it.

    Raises:
        UserError: damaged, hostile, or another format.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        _check_backend(folder / CONFIG)
        self.tensors, self.objects = read_metadata(folder)
        self.common = self._read_common()
        self._maps: dict[str, mmap.mmap] = {}
        self._checked: set[Chunk] = set()

    def _read_common(self) -> Any:
        path = self.folder / COMMON
        if not path.exists():
            return {}
        content = map_file(path)
        common = TorchZip(content, 0, len(content), str(path)).data(COMMON_NAMES)
        return common if isinstance(common, dict) else {}

    def box(self, name: str, start: tuple[int, ...], extent: tuple[int, ...]) -> Tensor:
        """A box of a tensor in the dtype it is stored in, in the shape ``extent``.

        Raises:
            UserError: its bytes are damaged, or not all of them are stored.
        """
        tensor = self.tensors[name]
        dtype = getattr(torch, tensor.dtype)
        values = torch.empty(extent, dtype=dtype)  # costs nothing until it is filled
        filled = 0
        seen: list[tuple[slice, ...]] = []
        cells = itertools.product(*(range(s, s + n) for s, n in zip(start[:-2], extent[:-2], strict=True)))
        for chunk in dict.fromkeys(c for cell in cells for c in tensor.cells.get(cell, [])):
            cut = _overlap(start, extent, chunk)
            if cut is not None:
                target, source = cut
                if any(_meet(target, other) for other in seen):
                    raise UserError(f"{self.folder / METADATA}: two boxes of {name} hold the same elements")
                seen.append(target)
                part = self._read(name, chunk, source, dtype)
                if part.shape == values.shape:
                    return part
                values[target] = part
                filled += part.numel()
        if filled != values.numel():
            raise UserError(f"{self.folder}: {name} is stored in part only")
        return values

    def _read(self, name: str, chunk: Chunk, source: tuple[slice, ...], dtype: torch.dtype) -> Tensor:
        path = self.folder / chunk.file
        if chunk.file not in self._maps:
            self._maps[chunk.file] = map_file(path)
        origin = f"{path} ({name} at {list(chunk.start)})"
        zipped = TorchZip(self._maps[chunk.file], chunk.offset, chunk.length, origin)
        layout, entry, first = zipped.tensor()
        kind = self.tensors[name].kind
        if tuple(layout.array.shape[:-1]) != chunk.extent or layout.kind != kind:
            raise UserError(
                f"{origin}: holds {list(layout.array.shape[:-1])} {layout.kind}, {METADATA} says "
                f"{list(chunk.extent)} {kind}"
            )
        if chunk not in self._checked:
            zipped.check(entry, first)
            self._checked.add(chunk)
        return layout.box(source, dtype)

    def checksum(self, name: str) -> int:
        """CRC-32 of a tensor's bytes, row-major, in the dtype it is stored in."""
        tensor, crc = self.tensors[name], 0
        tail = tensor.shape[-2:]
        for cell in tensor.leading():
            part = self.box(name, (*cell, *(0 for _ in tail)), (*(1 for _ in cell), *tail))
            crc = crc32_of(part, crc)
        return crc


def _check_backend(path: Path) -> None:
    try:
        described = json.loads(path.read_text())
        backend, version = described["sharded_backend"], described["sharded_backend_version"]
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read: {error.strerror}; a distributed checkpoint is expected (Megatron-LM's "
            "--ckpt-format torch_dist)"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a Megatron-core distributed checkpoint: {error!r}") from None
    if backend != "torch_dist":
        raise UserError(f"{path}: sharded_backend ({backend}) is not supported; save it as torch_dist")
    if version != 1:
        raise UserError(f"{path}: sharded_backend_version ({version}) is not known; 1 is")


def _overlap(
    start: tuple[int, ...], extent: tuple[int, ...], chunk: Chunk
) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """Where a chunk's part of a box lies (in the box, in the chunk); None where they do not meet."""
    target, source = [], []
    for mine, size, theirs, length in zip(start, extent, chunk.start, chunk.extent, strict=True):
        first, last = max(mine, theirs), min(mine + size, theirs + length)
        if first >= last:
            return None
        target.append(slice(first - mine, last - mine))
        source.append(slice(first - theirs, last - theirs))
    return tuple(target), tuple(source)


def _meet(one: tuple[slice, ...], other: tuple[slice, ...]) -> bool:
    return all(a.start < b.stop and b.start < a.stop for a, b in zip(one, other, strict=True))
