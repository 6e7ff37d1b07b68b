"""The ``model`` section of a run file."""

from typing import Any, Literal, Self

from pydantic import BaseModel, Field, field_validator, model_validator

from .mla_config import MLAConfig, YarnConfig
from .shapes import SHAPES

# Keys of ordinary attention: the only legal value beside latent attention.
_BESIDE_MLA = {"qk_norm": "none", "rotary_fraction": 1.0, "qkv_bias": False}


class ModelConfig(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """A decoder-only transformer: RMSNorm, rotary positions, SwiGLU.

    ``shape`` names a rung of the ladder in models/shapes.py; keys given beside it win over the rung's. With ``mla``,
    ``kv_heads`` and ``head_dim`` follow from it: each head has its own keys, of ``nope_dim + rope_dim`` features.
    """

    shape: str | None = Field(None, description="rung of the ladder, such as d64 or 1.4B")
    layers: int = Field(ge=1, le=10_000)
    width: int = Field(ge=8, multiple_of=8, description="model width D")
    heads: int = Field(ge=1, le=100_000)
    kv_heads: int = Field(ge=1, le=100_000, description="key/value heads; default: heads")
    head_dim: int = Field(ge=2, multiple_of=2, description="default: width / heads")
    ffn: int = Field(ge=8, multiple_of=8, description="hidden width of dense feed-forward layers; default: 4 width")
    vocab_multiple: int = Field(128, ge=1, description="the vocabulary is padded to a multiple of this")
    tied: bool = Field(True, description="output head shares the embedding")
    qk_norm: Literal["none", "head", "full"] = Field("none", description="RMSNorm of q and k: per head or over all")
    max_seq: int | None = Field(None, ge=1, description="longest sequence; default: training.seq")
    norm_eps: float = Field(1e-5, gt=0, description="what every RMSNorm adds to the mean square")
    rope_base: int | float = Field(10_000, ge=1)
    rotary_fraction: float = Field(1.0, gt=0, le=1, description="share of each head's features, the first, that rotate")
    qkv_bias: bool = Field(False, description="whether queries, keys and values have a bias")
    init_std: float | None = Field(None, gt=0, description="std of all matrices; default: 1/sqrt(fan-in)")
    mla: MLAConfig | None = Field(None, description="latent attention; default: ordinary attention")
    yarn: YarnConfig | None = Field(None, description="rotary positions stretched to longer texts; with mla")

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        content = dict(given)
        if content.get("shape") is not None:
            if str(content["shape"]) not in SHAPES:
                raise ValueError(
                    f"model.shape ({content['shape']}): unknown; the strings of the ladder are {', '.join(SHAPES)}"
                )
            rung = SHAPES[content["shape"]]
            keys = rung.as_keys()
            if content.get("mla") is not None:
                keys = {key: value for key, value in keys.items() if key not in ("kv_heads", "head_dim")}
            content = {**keys, **{k: v for k, v in content.items() if v is not None}}
        width, heads = content.get("width"), content.get("heads")
        if isinstance(width, int) and isinstance(heads, int) and heads > 0:
            if content.get("kv_heads") is None:
                content["kv_heads"] = heads
            latent = _head_dim(content.get("mla"))
            if content.get("head_dim") is None and latent is not None:
                content["head_dim"] = latent
            elif content.get("head_dim") is None:
                if width % heads:
                    raise ValueError(
                        f"model.heads ({heads}) must divide model.width ({width}), or give model.head_dim; "
                        f"try {', '.join(str(h) for h in range(1, min(heads, 64) + 4) if width % h == 0)}"
                    )
                content["head_dim"] = width // heads
            if content.get("ffn") is None:
                content["ffn"] = 4 * width
        else:  # complain of width and heads alone, not of what follows from them
            content = {"kv_heads": 1, "head_dim": 2, "ffn": 8, **{k: v for k, v in content.items() if v is not None}}
        return content

    @field_validator("rope_base")
    @classmethod
    def _whole_where_it_is(cls, base: int | float) -> int | float:
        """One number has one spelling, so that it has one hash."""
        return int(base) if base == int(base) else base

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.mla is not None:
            self._check_latent(self.mla)
        elif self.yarn is not None:
            raise ValueError("model.yarn needs model.mla; ordinary attention has plain rotary positions only")
        rotary = self.head_dim * self.rotary_fraction
        if rotary % 2:
            raise ValueError(
                f"model.rotary_fraction ({self.rotary_fraction:g}) of model.head_dim ({self.head_dim}) is {rotary:g} "
                f"features; an even number rotates, so try {max(round(rotary / 2), 1) * 2 / self.head_dim:g}"
            )
        if self.heads % self.kv_heads:
            raise ValueError(
                f"model.kv_heads ({self.kv_heads}) must divide model.heads ({self.heads}); "
                f"try {', '.join(str(k) for k in range(1, self.heads + 1) if self.heads % k == 0)}"
            )
        return self

    def _check_latent(self, mla: MLAConfig) -> None:
        """A key that says something else than latent attention does, or would do nothing beside it, is refused."""
        for key, legal in {**_BESIDE_MLA, "kv_heads": self.heads, "head_dim": mla.head_dim}.items():
            if getattr(self, key) != legal:
                raise ValueError(
                    f"model.{key} ({getattr(self, key)}) does not go with model.mla, where it is {legal}; leave it out"
                )

    @property
    def rotary_dim(self) -> int:
        """Features of a head that rotate with its position."""
        return self.mla.rope_dim if self.mla is not None else int(self.head_dim * self.rotary_fraction)

    def padded_vocab(self, vocab: int) -> int:
        """``vocab`` rounded up to ``vocab_multiple``: a function of the model, never of its layout."""
        return -(-vocab // self.vocab_multiple) * self.vocab_multiple


def _head_dim(mla: Any) -> int | None:
    """What ``head_dim`` is with this ``mla`` section, None without one.

    Of a section that is not valid its own fields complain, so that any legal number will do.
    """
    if mla is None or isinstance(mla, MLAConfig):
        return None if mla is None else mla.head_dim
    parts = [mla.get(key) if isinstance(mla, dict) else None for key in ("nope_dim", "rope_dim")]
    return max(sum(part for part in parts if isinstance(part, int)) // 2 * 2, 2)
