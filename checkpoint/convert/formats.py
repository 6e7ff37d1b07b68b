"""What a format is to ``moescale convert``: it opens as a `Source` of logical tensors, or is written from one.

The two sides never meet. A `Source` says which stored tensors each logical tensor is made of and reads one logical
tensor at a time; a `Format` writes itself by asking for logical tensors in whatever order and grouping it stores them.
So a conversion holds one tensor at a time (a fused one: what it is fused from), and `ledger.py` can account for every
stored tensor on both sides without knowing either. Logical names, shapes and parts are those of models/logical.py:
``("master", "layers.0.attention.q")``, ``("buffer", "layers.1.moe.bias")``.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import Tensor

from ...models.config import ModelConfig
from ...models.logical import buffer_shapes, logical_shapes
from ...moe.config import MoEConfig
from ...parallel.groups import Groups
from ..state import BUFFER, MASTER

IN_TRAINING = "acts in training only"  # why a key of a configuration is without effect here
Key = tuple[str, str]  # part and logical name
Reader = Callable[[str, str], Tensor]  # part and logical name -> the whole logical tensor
DType = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class Architecture:
    """What a model computes, apart from its weights.

    Attributes:
        vocab: tokens with a meaning. Rows of embedding and head from there on, up to ``model.padded_vocab(vocab)``, are
            padding: zero when a source does not store them, never written to a format that does not pad.
        special: ids of special tokens by transformers' name (``eos_token_id`` ...). They change nothing that the model
            computes, but without them nobody knows where a text ends.
    """

    model: ModelConfig
    moe: MoEConfig | None
    vocab: int
    special: Mapping[str, Any] = field(default_factory=dict)


def logical_tensors(found: Architecture) -> dict[Key, tuple[int, ...]]:
    """Everything that decides what a model computes: parameters, and the biases that select experts."""
    parameters = logical_shapes(found.model, found.moe, found.vocab)
    buffers = {name: s for name, s in buffer_shapes(found.model, found.moe).items() if name.endswith(".bias")}
    return {(MASTER, name): s for name, s in parameters.items()} | {(BUFFER, name): s for name, s in buffers.items()}


@dataclass(frozen=True)
class Stored:
    """A tensor as a file holds it; ``dtype`` in safetensors' spelling: F32, BF16, F16."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Setting:
    """What became of a key of the source's configuration: ``translated``, or ``without effect`` and why."""

    key: str
    value: Any
    fate: Literal["translated", "without effect"]
    why: str = ""


class Source(Protocol):
    """A model opened for reading. Opening it has checked its configuration and the names and shapes of its tensors.

    Attributes:
        architecture: the translated configuration.
        settings: every key of the source's own configuration and its fate.
        files: tokenizer files that go along: name in the target folder -> path.
    """

    architecture: Architecture
    settings: list[Setting]
    files: Mapping[str, Path]

    def stored(self) -> Mapping[str, Stored]:
        """Every tensor that the source's files hold, by its name there, whether or not it is understood."""

    def left_out(self) -> Mapping[str, str]:
        """Stored tensors that are not converted on purpose, and why; for example an optimizer's state."""

    def made_of(self, part: str, name: str) -> tuple[str, ...]:
        """The stored tensors that a logical tensor is made of; empty where the format implies its value (zeros).

        Raises:
            KeyError: no such logical tensor in this architecture.
        """

    def whole(self, part: str, name: str) -> Tensor:
        """A whole logical tensor, in its logical shape and the dtype it is stored in.

        Raises:
            UserError: it cannot be read.
        """

    def checksum(self, stored: str) -> int:
        """CRC-32 of a stored tensor's bytes: row-major, little-endian, in the dtype it is stored in."""


@dataclass(frozen=True)
class Target:
    """A tensor that was written: its name in the target and the logical tensors that it holds, all of each.

    Attributes:
        checksum: CRC-32 of its bytes.
        logical: (part, name) of each; empty for what the format wants and the model does not have (then ``why``).
    """

    name: str
    stored: Stored
    checksum: int
    logical: tuple[Key, ...]
    why: str = ""


class Format(Protocol):
    """One of the names that ``--to`` takes.

    Attributes:
        takes_configuration: whether the user may give the architecture (``--config``); where a source's files do not
            tell it, its `open` asks for it.
    """

    name: str
    takes_configuration: bool

    def recognises(self, path: Path) -> bool:
        """Whether ``path`` looks like this format. Exactly one format recognises a readable source."""

    def open(self, path: Path, given: Architecture | None) -> Source:
        """Open ``path``.

        Args:
            given: the architecture, where the files do not hold it; otherwise None.

        Raises:
            UserError: damaged, hostile, contradicts ``given``, or holds what we cannot express: names key and value.
        """

    def refuse(self, architecture: Architecture) -> None:
        """Check that the format can express ``architecture``; called before anything is written.

        Raises:
            UserError: names the key that it cannot express, its value, and what it could.
        """

    def write(self, folder: Path, architecture: Architecture, read: Reader, dtype: DType) -> Iterable[Target]:
        """Write configuration and tensors into the empty ``folder``; yields or returns every tensor written.

        Files that went to the disk are read back: a checksum in a `Target` is of what the disk gives.

        Raises:
            OSError: the disk is full or not writable, or gives back other bytes.
        """

    def logits(self, path: Path, architecture: Architecture, tokens_BS: Tensor, dtype: DType, groups: Groups) -> Tensor:
        """``[B, S, vocab]`` float32: what the format's own code computes in fp32 from weights rounded to ``dtype``.

        Parameters are rounded, not buffers. ``groups`` are those of a world of one rank.

        Raises:
            UserError: the code is not installed.
        """
