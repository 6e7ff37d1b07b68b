"""Upcycling: a dense model becomes a mixture that computes the same, as the start of a training run.

Sparse upcycling (Komatsuzaki et al. 2022, 2212.05055) copies the feed-forward layer into every expert. Fine-grained
experts (He et al. 2024, 2410.07524, virtual groups) are slices of it: with a granularity of G = ffn / expert_width,
expert j holds slice j mod G of the hidden units, and the G experts of each virtual group share one random row of the
router. Their scores are equal, so a token's K visits go to whole groups, K / G of them, and each group together is the
dense layer.

The weights of a token's visits sum to 1 where the score is normalized; a group's share is spread evenly over its
G members, so what the experts write is multiplied by G (over ``moe.weight_scale``) to give back what the dense layer
wrote. Other scores sum to what the router happens to say, and no constant could mend that: they are refused.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..base.config import load_yaml, validate
from ..base.errors import UserError
from ..models.config import ModelConfig
from ..models.initialise import draw_box
from ..models.names import Piece
from ..moe.config import MoEConfig
from .convert.formats import Architecture, Setting, Source, Stored
from .state import MASTER

_EXPERT = re.compile(r"(layers\.\d+\.)moe\.experts\.(\d+)\.(gate|up|down)")
_ROUTER = re.compile(r"layers\.\d+\.moe\.router")
_BIAS = re.compile(r"layers\.\d+\.moe\.bias")


@dataclass(frozen=True)
class Upcycling:
    """What a dense model is to become.

    Attributes:
        noise: standard deviation of what is added to each expert's matrices, as a multiple of their own; 0 leaves
            experts that only their tokens will tell apart, and the function as it was.
        seed: of routers and noise.
    """

    moe: MoEConfig
    noise: float = 0.0
    seed: int = 0


def load_upcycling(path: Path, noise: float = 0.0) -> Upcycling:
    """What a run file's ``moe`` section and ``training.seed`` ask for.

    Raises:
        UserError: anything wrong with the file.
    """
    content = load_yaml(path)
    if content.get("moe") is None:
        raise UserError(f"{path}: has no moe section")
    seed = (content.get("training") or {}).get("seed", 0)
    return Upcycling(validate(MoEConfig, content["moe"], f"{path}: moe"), noise, int(seed))


class Upcycled:
    """A dense source as that of a mixture: see `convert.formats.Source`.

    Raises:
        UserError: the mixture could not start from this model; names the key, its value and what could.
    """

    def __init__(self, dense: Source, wanted: Upcycling):
        model, moe = dense.architecture.model, wanted.moe
        if dense.architecture.moe is not None:
            raise UserError("--upcycle: the source is a mixture already")
        self.granularity = _check(model, moe)
        self.dense, self.wanted = dense, wanted
        self.architecture = Architecture(model, moe, dense.architecture.vocab, dense.architecture.special)
        self.settings = [*dense.settings, Setting("moe", moe.model_dump(mode="json"), "translated", "--upcycle")]
        self.files: Mapping[str, Path] = dense.files

    def stored(self) -> Mapping[str, Stored]:
        return self.dense.stored()

    def left_out(self) -> Mapping[str, str]:
        return self.dense.left_out()

    def made_of(self, part: str, name: str) -> tuple[str, ...]:
        if expert := _EXPERT.fullmatch(name):
            return self.dense.made_of(MASTER, f"{expert[1]}ffn.{expert[3]}")
        drawn = _ROUTER.fullmatch(name) or _BIAS.fullmatch(name)
        return () if drawn else self.dense.made_of(part, name)

    def whole(self, part: str, name: str) -> Tensor:
        if expert := _EXPERT.fullmatch(name):
            return self._expert(name, expert[1], int(expert[2]), expert[3])
        if _ROUTER.fullmatch(name):
            return self._router(name)
        if _BIAS.fullmatch(name):
            return torch.zeros(self.wanted.moe.experts)
        return self.dense.whole(part, name)

    def checksum(self, stored: str) -> int:
        return self.dense.checksum(stored)

    def _expert(self, name: str, layer: str, number: int, kind: str) -> Tensor:
        """A slice of the dense layer's hidden units, and noise."""
        whole = self.dense.whole(MASTER, f"{layer}ffn.{kind}")
        rows = kind != "down"
        values = whole.chunk(self.granularity, dim=0 if rows else 1)[number % self.granularity].float()
        if not rows:
            values = values * (self.granularity / self.wanted.moe.weight_scale)
        if self.wanted.noise:
            values = values + self._draw(f"{name}/noise", tuple(values.shape), self.wanted.noise * float(values.std()))
        return values.contiguous()

    def _router(self, name: str) -> Tensor:
        """As a new model's, one row for each virtual group."""
        model, groups = self.architecture.model, self.wanted.moe.experts // self.granularity
        std = model.init_std if model.init_std is not None else model.width**-0.5
        return self._draw(name, (groups, model.width), std).repeat_interleave(self.granularity, dim=0)

    def _draw(self, name: str, shape: tuple[int, ...], std: float) -> Tensor:
        return draw_box(self.wanted.seed, Piece(name, shape, (0,) * len(shape), shape, lambda t: t), std)


def _check(model: ModelConfig, moe: MoEConfig) -> int:
    """The granularity G = ffn / expert_width of an upcycling that preserves the function."""
    hidden = moe.width_of_expert(model.width)
    if model.ffn % hidden:
        raise UserError(
            f"moe.expert_width ({hidden}) must divide model.ffn ({model.ffn}): experts are copies or slices of the "
            "dense layer"
        )
    granularity = model.ffn // hidden
    for key in ("experts", "active"):
        if getattr(moe, key) % granularity:
            raise UserError(
                f"moe.{key} ({getattr(moe, key)}) must be a multiple of model.ffn / moe.expert_width ({granularity}), "
                "so that the slices of the dense layer make it whole"
            )
    if (moe.experts // moe.groups) % granularity:
        raise UserError(
            f"moe.groups ({moe.groups}) of moe.experts ({moe.experts}) would part the {granularity} slices of the "
            "dense layer; use moe.groups=1"
        )
    for key, legal in (("router", "topk"), ("shared", 0), ("capacity", None)):
        if getattr(moe, key) != legal:
            raise UserError(f"moe.{key} ({getattr(moe, key)}) would not compute what the dense layer did; use {legal}")
    if not moe.score.endswith("normalized"):
        raise UserError(
            f"moe.score ({moe.score}): the weights of a token's experts do not sum to 1, so that nothing would be the "
            "dense layer; use softmax_normalized or sigmoid_normalized"
        )
    return granularity
