"""Shrinking a study: the same families, axes and rules at s times the compute, on whatever machine there is.

Along a compute-optimal frontier parameters and tokens both grow about as the square root of compute (Hoffmann et al.
2022, 2203.15556) and the best batch about as its cube root (DeepSeek LLM, 2401.02954, figure 3), so that is how they
shrink. Sequence length, mixtures and schedule stay.
"""

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

from ..base.config import merge, validate
from ..base.errors import UserError
from ..data import DataConfig
from ..models.config import ModelConfig
from ..models.counts import count_parameters, flops_per_token
from ..models.shapes import SHAPES
from ..moe.config import MoEConfig
from .run_keys import Content, value_at
from .vocabularies import Vocabularies

_FIXED_SIZES = (
    *(f"model.{key}" for key in ("layers", "width", "heads", "kv_heads", "head_dim", "ffn", "mla")),
    "moe.expert_width",
)
_TRUNKS = ("schedule.branches", "schedule.parent")


class StudyScale:
    """How the runs of one study shrink.

    Args:
        scale: s, in (0, 1].
        contents: of all run files of the study.

    Raises:
        UserError: two shapes would become one.
    """

    def __init__(self, scale: float, contents: Iterable[Content]):
        contents = list(contents)
        self.scale = scale
        given = [value_at(content, "model.shape") for content in contents]
        self._shapes = [shape for shape in SHAPES if shape in given]
        _refuse_merged(self._shapes, scale)
        # All batches alike, or the runs that measure the noise scale could not be compared with the others.
        self._even = any(value_at(content, "noise.every") for content in contents)
        self._vocabularies = Vocabularies()

    def shrink(self, content: Content) -> dict[str, Any]:
        """The content of the run file that takes the place of ``content``. What is not valid is left to validation.

        Raises:
            UserError: the run says how large it is in a way that cannot shrink.
        """
        if self.scale == 1:
            return dict(content)
        self._refuse(content)
        shape, batch = value_at(content, "model.shape"), value_at(content, "training.batch")
        changed = merge(content, {"parallel": {"tensor": 1, "pipeline": 1, "expert": 1}})
        if shape in self._shapes:
            changed = merge(changed, {"model": {"shape": _rung(shape, self.scale)}})
        if not _is_positive(batch):
            return changed
        changed = merge(changed, {"training": self._training(content, batch)})
        small = value_at(content, "noise.small_batch")
        if _is_positive(small):
            changed = merge(changed, {"noise": {"small_batch": _divisor(self._batch(batch), small / batch)}})
        warmup = value_at(content, "schedule.warmup")
        if _is_positive(warmup) and warmup >= 1:
            steps = max(round(warmup * self._step_ratio(content, changed)), 1)
            changed = merge(changed, {"schedule": {"warmup": steps}})
        return changed

    def _refuse(self, content: Content) -> None:
        where = f"scale ({self.scale:g})"
        for key in _FIXED_SIZES:
            if value_at(content, key) is not None:
                other = "moe.granularity" if key == "moe.expert_width" else "model.shape"
                raise UserError(
                    f"{where} does not know what {key} ({value_at(content, key)}) becomes; give {other} instead"
                )
        if value_at(content, "model.shape") is None:
            raise UserError(f"{where} chooses another rung of the ladder for model.shape, which is not given")
        for key in _TRUNKS:
            if value_at(content, key):
                raise UserError(f"{where}: {key} counts the steps of another run, which shrinks too; leave it out")

    def _batch(self, batch: float) -> int:
        """Sequences; even where the noise scale is measured, so that there is a smaller batch that divides it."""
        wanted = self.scale ** (1 / 3) * batch
        return max(2 * round(wanted / 2), 2) if self._even else max(round(wanted), 1)

    def _training(self, content: Content, batch: float) -> dict[str, Any]:
        changed: dict[str, Any] = {"batch": self._batch(batch), "micro_batch": None}
        flops, tokens, steps = (value_at(content, f"training.{key}") for key in ("flops", "tokens", "steps"))
        if _is_positive(flops):
            changed["flops"] = float(f"{self.scale * flops:.6g}")
        if _is_positive(tokens):
            changed["tokens"] = float(f"{math.sqrt(self.scale) * tokens:.6g}")
        if _is_positive(steps):
            changed["steps"] = max(round(math.sqrt(self.scale) * steps * batch / self._batch(batch)), 1)
        return changed

    def _step_ratio(self, content: Content, changed: Content) -> float:
        """Steps at this scale over steps at scale 1; the same for all budgets of a shape, which share a warm-up."""
        batches = _positive_at(content, "training.batch") / _positive_at(changed, "training.batch")
        if value_at(content, "training.flops") is None:
            return math.sqrt(self.scale) * batches
        return self.scale * batches * self._flops_per_token(content) / self._flops_per_token(changed)

    def _flops_per_token(self, content: Content) -> int:
        origin = f"scale ({self.scale:g})"
        model = validate(ModelConfig, _section(content, "model"), origin)
        moe = validate(MoEConfig, _section(content, "moe"), origin) if content.get("moe") is not None else None
        vocab = self._vocabularies.of(validate(DataConfig, _section(content, "data"), origin))
        return flops_per_token(model, moe, vocab, int(_positive_at(content, "training.seq"))).total


def _section(content: Content, key: str) -> Mapping[str, Any]:
    section = content.get(key)
    if not isinstance(section, Mapping):
        raise UserError(f"{key} ({section}): a section is expected")
    return section


def _positive_at(content: Content, key: str) -> float:
    value = value_at(content, key)
    if not _is_positive(value):
        raise UserError(f"{key} ({value}): a positive number is expected")
    return float(value)


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max


@cache
def _parameters(shape: str) -> int:
    """Non-embedding parameters of the dense model."""
    return count_parameters(ModelConfig.model_validate({"shape": shape}), None, vocab=1).total


@cache
def _rung(shape: str, scale: float) -> str:
    """The rung with the number of parameters nearest to sqrt(scale) times those of ``shape``, in log."""
    wanted = math.log(math.sqrt(scale) * _parameters(shape))
    return min(SHAPES, key=lambda name: abs(math.log(_parameters(name)) - wanted))


def _refuse_merged(shapes: Sequence[str], scale: float) -> None:
    first: dict[str, str] = {}
    for shape in shapes:
        other = first.setdefault(_rung(shape, scale), shape)
        if other != shape:
            raise UserError(
                f"scale ({scale:g}): model.shape {other} and {shape} would both become {_rung(shape, scale)}; "
                f"a scale of {_smallest_above(scale, shapes):g} keeps the shapes of this study apart"
            )


def _smallest_above(scale: float, shapes: Sequence[str]) -> float:
    """The smallest scale above ``scale``, in steps of 1, 2, 5, that keeps ``shapes`` apart."""
    steps = [float(f"{digit}e{exponent}") for exponent in range(-20, 0) for digit in (1, 2, 5)]
    apart = (s for s in steps if s > scale and len({_rung(shape, s) for shape in shapes}) == len(shapes))
    return next(apart, 1.0)


def _divisor(batch: int, share: float) -> int:
    """The proper divisor of ``batch`` that is nearest to this share of it, in log; the batch itself where it is 1."""
    proper = [n for n in range(1, batch) if batch % n == 0] or [1]
    return min(proper, key=lambda n: abs(math.log(n / (share * batch))))
