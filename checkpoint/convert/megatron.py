"""The format ``megatron``: distributed checkpoints (``torch_dist``) of Megatron-core 0.16, dense and mixture.

A folder is one checkpoint, or what Megatron-LM makes: ``latest_checkpointed_iteration.txt`` beside ``iter_0001000`` or
``release``. Such a folder with ``release`` is what is written, with arguments, as Megatron-LM's ``--load`` wants it;
Megatron-core's ``dist_checkpointing.load`` takes the ``release`` folder.
"""

import argparse
import errno
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ...base.errors import UserError
from ...base.files import write_atomically
from ...parallel.groups import Groups
from ..state import MASTER
from .formats import Architecture, DType, Key, Reader, Setting, Stored, Target
from .huggingface import FILES
from .megatron_arguments import architecture_of, arguments_of, check_agree, check_expressible
from .megatron_files import CONFIG, DistCheckpoint
from .megatron_metadata import METADATA
from .megatron_names import Item, Naming, Place
from .megatron_writer import DistWriter
from .tensor_files import DTYPES, SPELLING, cast
from .unpickle import Record

NAME = "megatron"
TRACKER, RELEASE = "latest_checkpointed_iteration.txt", "release"
_EMBEDDING = "embedding.word_embeddings.weight"
_OURS = "moescale"  # our entry of common.pt: what Megatron-LM has no argument for
_OPTIMIZER = re.compile(r"(chained_\d+\.)?optimizer\.|rng_state")
_TWICE = "the same norm, under the name that local specs have for it"


class MegatronSource:
    """A distributed checkpoint, opened: see `formats.Source`."""

    def __init__(self, path: Path, given: Architecture | None):
        folder = checkpoint_folder(path)
        self._checkpoint = DistCheckpoint(folder)
        self.architecture, self.settings = _architecture(self._checkpoint, given, str(folder))
        self.files: Mapping[str, Path] = {name: path / name for name in FILES if (path / name).is_file()}
        self._items: dict[Key, tuple[Item, int, list[list[Place]]]] = {}
        self._expected: dict[Key, str] = {}
        naming = Naming(self.architecture)
        for item in naming.items():
            found = naming.read_at(item, self._checkpoint.tensors)
            for places in found:
                for place in places:
                    self._check(item, place)
            for number, member in enumerate(item.members):
                self._items[member] = (item, number, found)
                self._expected[member] = naming.written_at(item)[0].name
        self._last: tuple[Place, Tensor] | None = None

    def _check(self, item: Item, place: Place) -> None:
        stored = self._checkpoint.tensors[place.name]
        where = f"{self._checkpoint.folder}: {place.name}"
        if item.padded:
            enough = len(stored.shape) == 2 and stored.shape[0] >= self.architecture.vocab
            if not enough or stored.shape[1] != place.extent[1]:
                raise UserError(
                    f"{where} has shape {stored.shape}; {self.architecture.vocab} tokens of width {place.extent[1]} "
                    "are expected"
                )
        elif stored.shape != place.shape:
            raise UserError(f"{where} has shape {stored.shape}; the architecture says {place.shape}")
        if stored.spelling not in DTYPES:
            raise UserError(f"{where} is stored as {stored.spelling}; {', '.join(DTYPES)} can be converted")

    def stored(self) -> Mapping[str, Stored]:
        return {name: Stored(t.shape, t.spelling) for name, t in self._checkpoint.tensors.items()}

    def left_out(self) -> Mapping[str, str]:
        names = [name for name in self._checkpoint.tensors if _OPTIMIZER.match(name)]
        return dict.fromkeys(names, "state of the optimizer or of random numbers: a run from here starts with new ones")

    def made_of(self, part: str, name: str) -> tuple[str, ...]:
        _, member, found = self._items[part, name]
        names = [place.name for places in found for place in places if place.member in (None, member)]
        return tuple(dict.fromkeys(names)) or (self._expected[part, name],)

    def whole(self, part: str, name: str) -> Tensor:
        item, member, found = self._items[part, name]
        if not found:
            raise UserError(f"{self._checkpoint.folder}: {self._expected[part, name]} is missing")
        first, *others = [self._member(item, member, places) for places in found]
        if any(not first.equal(other) for other in others):
            twice = " and ".join(places[0].name for places in found)
            raise UserError(f"{self._checkpoint.folder}: {twice} are one tensor ({name}) and differ")
        return first

    def _member(self, item: Item, member: int, places: list[Place]) -> Tensor:
        """One member of an item from one of its spellings."""
        if len(places) > 1:
            return self._read(next(place for place in places if place.member == member))
        values = self._read(places[0])
        return _with_rows(values, item.shape[0]) if item.padded else item.part(values, member)

    def _read(self, place: Place) -> Tensor:
        """What lies at ``place``; the last is kept, for the members of an item are asked for one after the other."""
        if self._last is None or self._last[0] != place:
            extent = self._checkpoint.tensors[place.name].shape[len(place.leading) :]
            start = (*place.leading, *(0 for _ in extent))
            box = self._checkpoint.box(place.name, start, (*(1 for _ in place.leading), *extent))
            self._last = place, box.view(extent)
        return self._last[1]

    def checksum(self, stored: str) -> int:
        return self._checkpoint.checksum(stored)


def _with_rows(values: Tensor, rows: int) -> Tensor:
    """Cut or zero-padded to ``rows``: those behind the vocabulary mean nothing."""
    if values.shape[0] >= rows:
        return values[:rows]
    padded = values.new_zeros(rows, values.shape[1])
    padded[: values.shape[0]] = values
    return padded


def checkpoint_folder(path: Path) -> Path:
    """The checkpoint that ``path`` means.

    Raises:
        UserError: the tracker names none.
    """
    if (path / CONFIG).is_file() or not (path / TRACKER).is_file():
        return path
    text = (path / TRACKER).read_text(encoding="utf-8", errors="replace").strip()
    if text != RELEASE and not re.fullmatch(r"\d{1,9}", text):
        raise UserError(f"{path / TRACKER}: {text!r:.80} is no number of an iteration")
    return path / (RELEASE if text == RELEASE else f"iter_{int(text):07d}")


def _architecture(
    checkpoint: DistCheckpoint, given: Architecture | None, origin: str
) -> tuple[Architecture, list[Setting]]:
    arguments = checkpoint.common.get("args")
    ours = checkpoint.common.get(_OURS)
    if isinstance(arguments, Record) and isinstance(arguments.state, dict):
        found, settings = architecture_of(arguments.state, origin)
        if given is not None:
            check_agree(found, given, origin)
            found = replace(given, vocab=given.vocab or found.vocab)
    elif given is not None:
        found, settings = given, [Setting("--config", "sections model and moe", "translated")]
        if not found.vocab:
            found = replace(
                found, vocab=checkpoint.tensors[_EMBEDDING].shape[0] if _EMBEDDING in checkpoint.tensors else 1
            )
    else:
        raise UserError(
            f"{origin}: holds tensors and no arguments (common.pt of Megatron-LM has them), so nobody knows its heads "
            "or its rotary base: give --config RUN.yaml with the model and moe sections that it was trained with"
        )
    if checkpoint.objects:
        why = "state that layers keep beside their weights (of fp8); it is not read"
        settings.append(Setting("objects", len(checkpoint.objects), "without effect", why))
    if isinstance(ours, dict) and isinstance(ours.get("special"), dict):
        found = replace(found, special=ours["special"])
    return found, settings


class Megatron:
    """Megatron-core's distributed checkpoints as a `formats.Format`."""

    name = NAME
    takes_configuration = True

    def recognises(self, path: Path) -> bool:
        """Whether ``path`` is a distributed checkpoint, or a folder of Megatron-LM's with one."""
        if (path / TRACKER).is_file():
            return True
        return (path / CONFIG).is_file() and (path / METADATA).is_file()

    def open(self, path: Path, given: Architecture | None) -> MegatronSource:
        """See `formats.Format`."""
        return MegatronSource(path, given)

    def refuse(self, architecture: Architecture) -> None:
        """See `formats.Format`."""
        check_expressible(architecture)

    def write(self, folder: Path, architecture: Architecture, read: Reader, dtype: DType) -> list[Target]:
        """See `formats.Format`."""
        release = folder / RELEASE
        release.mkdir()
        common: dict[str, Any] = {
            "args": argparse.Namespace(**arguments_of(architecture)),
            "checkpoint_version": 3.0,
            "iteration": 0,
            _OURS: {"special": dict(architecture.special)},
        }
        writer = DistWriter(release, common)
        naming = Naming(architecture)
        targets = list(_write_tensors(writer, naming, read, dtype))
        for name in naming.extra_states():
            writer.add_nothing(name)
        writer.close()
        there = DistCheckpoint(release)
        for target in (target for target in targets if len(target.logical) < 2):  # the fused are compared in parts
            if there.checksum(target.name) != target.checksum:
                raise OSError(errno.EIO, f"{target.name} reads back otherwise than it was written", str(release))
        write_atomically(folder / TRACKER, RELEASE)
        return targets

    def logits(self, path: Path, architecture: Architecture, tokens_BS: Tensor, dtype: DType, groups: Groups) -> Tensor:
        """See `formats.Format`: Megatron-core's own GPTModel, filled as its ``sharded_state_dict`` says."""
        from .megatron_model import logits_of

        return logits_of(DistCheckpoint(checkpoint_folder(path)), architecture, tokens_BS, DTYPES[SPELLING[dtype]])


def _write_tensors(writer: DistWriter, naming: Naming, read: Reader, dtype: DType) -> Iterator[Target]:
    """Every global tensor, box by box."""
    tensors: dict[str, list[tuple[Item, Place]]] = {}
    for item in naming.items():
        for place in naming.written_at(item):
            tensors.setdefault(place.name, []).append((item, place))
    seen: set[Key] = set()
    for name, items in tensors.items():
        for item, place in items:
            values = item.fuse([_converted(read(*key), key, dtype) for key in item.members])
            start = (*place.leading, *(0 for _ in place.extent))
            writer.add(name, place.shape, start, values.view(*(1 for _ in place.leading), *place.extent))
        keys = tuple(key for item, _ in items for key in item.members if key not in seen)
        seen.update(keys)
        stored = Stored(items[0][1].shape, SPELLING[dtype] if items[0][0].members[0][0] == MASTER else "F32")
        yield Target(name, stored, writer.checksum(name), keys, "" if keys else _TWICE)


def _converted(tensor: Tensor, key: Key, dtype: DType) -> Tensor:
    return cast(tensor, SPELLING[dtype] if key[0] == MASTER else "F32", key[1])
