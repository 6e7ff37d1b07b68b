"""moescale's own format: a run's folder, of which a conversion reads or writes one checkpoint.

Written, it holds ``config.yaml`` with the ``model`` and ``moe`` sections (a run file can say ``extends:`` with its
path), tokenizer files and ``checkpoints/step-00000000`` with masters and selection biases; a run that starts from it
starts with zero moments.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from ...base.config import load_yaml, validate
from ...base.errors import UserError
from ...base.files import write_atomically
from ...base.yaml_text import parse_yaml
from ...data import DataConfig, Tokenizer, find_prepared, vocabulary_size
from ...data.prepare import TOKENIZER
from ...models.build import Stage, build_stage
from ...models.config import ModelConfig
from ...models.names import NameMap
from ...moe.config import MoEConfig
from ...parallel.groups import Groups
from ..checksum import crc32_of
from ..manifest import MANIFEST
from ..state import BUFFER, MASTER, PARTS
from ..storage import BadCheckpoint, Checkpoint, folder_of, steps_in, write_whole
from .formats import IN_TRAINING, Architecture, DType, Reader, Setting, Stored, Target, logical_tensors
from .huggingface import FILES
from .start import TRAINING_KEYS
from .tensor_files import DTYPES, SPELLING, ahead

NAME = "moescale"
CONFIG, CHECKPOINTS = "config.yaml", "checkpoints"


class RunSource:
    """A run's folder, opened: see `formats.Source`."""

    def __init__(self, path: Path, run: Path, checkpoint: Checkpoint):
        content = parse_yaml((run / CONFIG).read_text(encoding="utf-8"), str(run / CONFIG))
        if not isinstance(content, dict) or "model" not in content:
            raise UserError(f"{run / CONFIG}: has no model section")
        self._checkpoint = checkpoint
        self.files: Mapping[str, Path] = _tokenizer_files(run, content)
        self.architecture = _architecture(str(run / CONFIG), content, checkpoint.extra, self.files)
        self.settings = list(_settings(self.architecture))
        self._stored = {
            f"{part}/{name}": Stored(shape, "F32")
            for part in (*PARTS, BUFFER)
            for name, shape in checkpoint.tensors(part).items()
        }
        self._sums: dict[str, int] = {}
        self._check_shapes(path)

    def _check_shapes(self, path: Path) -> None:
        for (part, name), shape in logical_tensors(self.architecture).items():
            stored = self._stored.get(f"{part}/{name}")
            if stored is not None and stored.shape != shape:
                raise UserError(f"{path}: {part}/{name} has shape {stored.shape}; {CONFIG} says {shape}")

    def stored(self) -> Mapping[str, Stored]:
        return self._stored

    def left_out(self) -> Mapping[str, str]:
        reasons = {
            **{f"{part}/": "state of the optimizer" for part in PARTS if part != MASTER},
            f"{BUFFER}/": "counts that the next step's load-balance loss needs",
        }
        return {
            name: why
            for name in self._stored
            for prefix, why in reasons.items()
            if name.startswith(prefix) and not name.endswith(".moe.bias")
        }

    def made_of(self, part: str, name: str) -> tuple[str, ...]:
        return (f"{part}/{name}",)

    def whole(self, part: str, name: str) -> Tensor:
        try:
            tensor = self._checkpoint.whole(part, name)
        except BadCheckpoint as error:
            raise UserError(str(error)) from None
        if f"{part}/{name}" not in self._sums:
            self._sums[f"{part}/{name}"] = crc32_of(tensor)
        return tensor

    def checksum(self, stored: str) -> int:
        if stored not in self._sums:
            self.whole(*stored.split("/", 1))
        return self._sums[stored]


def _tokenizer_files(run: Path, content: Mapping[str, Any]) -> dict[str, Path]:
    """Those that lie in the folder, else the model that the run's data were made with."""
    found = {name: run / name for name in FILES if (run / name).is_file()}
    if found or "data" not in content:
        return found
    data = validate(DataConfig, content["data"], f"{run / CONFIG}: data")
    prepared = find_prepared(data)
    if prepared is not None:
        return {TOKENIZER: prepared.folder / TOKENIZER}
    return {} if data.tokenizer.model is None else {TOKENIZER: Path(data.tokenizer.model)}


def _architecture(
    origin: str, content: Mapping[str, Any], extra: Mapping[str, Any], files: Mapping[str, Path]
) -> Architecture:
    sections = dict(content["model"])
    if sections.get("max_seq") is None:
        sections["max_seq"] = (content.get("training") or {}).get("seq")
    model = validate(ModelConfig, sections, f"{origin}: model")
    moe = validate(MoEConfig, content["moe"], f"{origin}: moe") if content.get("moe") is not None else None
    if "vocab" in extra:
        return Architecture(model, moe, int(extra["vocab"]), dict(extra.get("special", {})))
    if "data" not in content:
        raise UserError(f"{origin}: has no data section, which would tell the size of the vocabulary")
    vocab = vocabulary_size(validate(DataConfig, content["data"], f"{origin}: data"))
    special = {"eos_token_id": Tokenizer.load(files[TOKENIZER]).eod} if TOKENIZER in files else {}
    return Architecture(model, moe, vocab, special)


def given_architecture(path: Path) -> Architecture:
    """The architecture that a run file describes (``--config``); its data section tells the vocabulary, 0 without one.

    Raises:
        UserError: anything wrong with the file.
    """
    content = load_yaml(path)
    if "model" not in content:
        raise UserError(f"{path}: has no model section")
    return _architecture(str(path), content, {} if "data" in content else {"vocab": 0}, {})


def _settings(found: Architecture) -> Iterator[Setting]:
    for section in ("model", "moe"):
        config = getattr(found, section)
        for key, value in ({} if config is None else config.model_dump(mode="json")).items():
            name = f"{section}.{key}"
            if name in TRAINING_KEYS and name != "model.max_seq":
                yield Setting(name, value, "without effect", IN_TRAINING)
            else:
                yield Setting(name, value, "translated")


class RunFolder:
    """moescale's own folders as a `formats.Format`."""

    name = NAME
    takes_configuration = False

    def recognises(self, path: Path) -> bool:
        """Whether ``path`` is a run's folder, or one checkpoint inside one."""
        return (path / CONFIG).is_file() or (path / MANIFEST).is_file()

    def open(self, path: Path, given: Architecture | None) -> RunSource:
        """See `formats.Format`."""
        try:
            run, checkpoint = _find(path)
            return RunSource(path, run, checkpoint)
        except BadCheckpoint as error:
            raise UserError(str(error)) from None

    def refuse(self, architecture: Architecture) -> None:
        """Nothing is refused: what opened as a source is expressed in our own terms."""

    def write(self, folder: Path, architecture: Architecture, read: Reader, dtype: DType) -> list[Target]:
        """See `formats.Format`.

        Raises:
            UserError: ``dtype`` is not fp32; masters are.
        """
        if dtype != "fp32":
            raise UserError(f"--dtype {dtype}: a checkpoint of moescale holds fp32 masters; leave it out")
        content: dict[str, Any] = {"model": architecture.model.model_dump(mode="json")}
        if architecture.moe is not None:
            content["moe"] = architecture.moe.model_dump(mode="json")
        write_atomically(folder / CONFIG, yaml.safe_dump(content, sort_keys=False))
        targets: list[Target] = []
        extra = {"optimizer_steps": 0, "vocab": architecture.vocab, "special": dict(architecture.special)}
        tensors = _stream(architecture, read, targets)
        write_whole(folder / CHECKPOINTS, 0, tensors, extra)
        return targets

    def logits(self, path: Path, architecture: Architecture, tokens_BS: Tensor, dtype: DType, groups: Groups) -> Tensor:
        """See `formats.Format`: the model that training builds."""
        model, moe = architecture.model, architecture.moe
        stage = build_stage(
            model, moe, vocab=architecture.vocab, seq=tokens_BS.shape[1], dtype="fp32", groups=groups
        ).eval()
        _load(stage, NameMap(model, moe, groups), _find(path)[1], DTYPES[SPELLING[dtype]])
        device = next(stage.parameters()).device
        with torch.no_grad():
            position_BS = torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS)
            logits_BSV: Tensor = stage[0](tokens_BS.to(device), position_BS.to(device), None)
        return logits_BSV[..., : architecture.vocab].float().cpu()


def _find(path: Path) -> tuple[Path, Checkpoint]:
    """The run's folder and the checkpoint that is meant.

    Raises:
        UserError: there is none.
        BadCheckpoint: its manifest is damaged. Tensors are verified as they are read.
    """
    if (path / MANIFEST).is_file():
        run = path.resolve().parent.parent
        if not (run / CONFIG).is_file():
            raise UserError(f"{path}: a checkpoint without its run: {run / CONFIG} is missing")
        return run, Checkpoint(path)
    steps = steps_in(path / CHECKPOINTS)
    if not steps:
        raise UserError(f"{path / CHECKPOINTS}: holds no checkpoint")
    return path, Checkpoint(folder_of(path / CHECKPOINTS, steps[-1]))


def _stream(found: Architecture, read: Reader, targets: list[Target]) -> Iterator[tuple[str, str, Tensor]]:
    shapes = logical_tensors(found)
    for (key, shape), tensor in zip(shapes.items(), ahead(lambda key: read(*key).float(), shapes), strict=True):
        targets.append(Target("/".join(key), Stored(shape, "F32"), crc32_of(tensor), (key,)))
        yield (*key, tensor)


def _load(stage: Stage, names: NameMap, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    with torch.no_grad():
        for entry in names.entries(stage).values():
            for piece in entry.pieces:
                piece.write(entry.parameter, checkpoint.box(MASTER, piece).to(dtype))
        for buffer in names.buffers(stage):
            if buffer.piece.name.endswith(".bias"):
                buffer.values.copy_(checkpoint.box(BUFFER, buffer.piece))
