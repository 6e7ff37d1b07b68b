"""What `bench convert` measures: a random model in a folder, converted and copied."""

import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..base.files import sync
from ..checkpoint.convert.convert import FORMATS, convert
from ..checkpoint.convert.formats import Architecture, logical_tensors
from .convert import ConvertCase

RUN, MIXTRAL = "moescale", "hf-mixtral"


class _Folder(ABC):
    """A random model in its source's format on the disk of the current folder; removed at the end."""

    def __init__(self, case: Mapping[str, Any]):
        wanted = ConvertCase(**case)
        self.source, self.target = (RUN, MIXTRAL) if wanted.way == "to" else (MIXTRAL, RUN)
        self._folder = tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".bench-convert-")
        self.root = Path(self._folder.name)
        found = Architecture(wanted.shape(), wanted.moe(), wanted.vocab)
        shapes = logical_tensors(found)
        generator = torch.Generator().manual_seed(0)

        def random(part: str, name: str) -> Tensor:
            return torch.empty(shapes[part, name]).uniform_(-1, 1, generator=generator)

        (self.root / "source").mkdir()
        [own] = [known for known in FORMATS if known.name == self.source]
        own.write(self.root / "source", found, random, "fp32")
        self.bytes_moved: int | None = sum(path.stat().st_size for path in _files(self.root / "source"))

    def step(self) -> None:
        self._make(self.root / "source", self.root / "target")
        shutil.rmtree(self.root / "before", ignore_errors=True)
        (self.root / "target").rename(self.root / "before")

    @abstractmethod
    def _make(self, source: Path, target: Path) -> None: ...

    def close(self) -> None:
        self._folder.cleanup()


class Convert(_Folder):
    """A `Stepper`: one conversion after another, each complete before the last one goes."""

    def warm_up(self) -> str:
        self.step()
        return f"{self.source} to {self.target}: read, accounted for, written, forced onto the disk, read back"

    def _make(self, source: Path, target: Path) -> None:
        convert(source, target, self.target, check=False)


class CopyFolder(_Folder):
    """A `Stepper`: copies the same files by the system's fastest way."""

    def warm_up(self) -> str:
        self.step()
        return "the source's files copied and forced onto the disk"

    def _make(self, source: Path, target: Path) -> None:
        shutil.copytree(source, target)
        for path in _files(target):
            sync(path)


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]
