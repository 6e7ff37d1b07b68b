"""The ``model`` section of a run file."""

from typing import Any, Literal, Self

from pydantic import BaseModel, Field, model_validator

from .shapes import SHAPES


class ModelConfig(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """A decoder-only transformer: RMSNorm, rotary positions, SwiGLU.

    ``shape`` names a rung of the ladder in models/shapes.py; keys given beside it win over the rung's.
    """

    shape: str | None = Field(None, description="rung of the ladder, such as d64 or 1.4B")
    layers: int = Field(ge=1)
    width: int = Field(ge=8, multiple_of=8, description="model width D")
    heads: int = Field(ge=1)
    kv_heads: int = Field(ge=1, description="key/value heads; default: heads")
    head_dim: int = Field(ge=2, multiple_of=2, description="default: width / heads")
    ffn: int = Field(ge=8, multiple_of=8, description="hidden width of dense feed-forward layers; default: 4 width")
    vocab_multiple: int = Field(128, ge=1, description="the vocabulary is padded to a multiple of this")
    tied: bool = Field(True, description="output head shares the embedding")
    qk_norm: Literal["none", "head", "full"] = Field("none", description="RMSNorm of q and k: per head or over all")
    max_seq: int | None = Field(None, ge=1, description="longest sequence; default: training.seq")
    rope_base: int = Field(10_000, ge=1)
    init_std: float | None = Field(None, gt=0, description="std of all matrices; default: 1/sqrt(fan-in)")

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        content = dict(given)
        if content.get("shape") is not None:
            if str(content["shape"]) not in SHAPES:
                raise ValueError(f"model.shape ({content['shape']}): unknown; the ladder is {', '.join(SHAPES)}")
            rung = SHAPES[content["shape"]]
            content = {**rung.as_keys(), **{k: v for k, v in content.items() if v is not None}}
        width, heads = content.get("width"), content.get("heads")
        if isinstance(width, int) and isinstance(heads, int) and heads > 0:
            if content.get("kv_heads") is None:
                content["kv_heads"] = heads
            if content.get("head_dim") is None:
                if width % heads:
                    raise ValueError(
                        f"model.heads ({heads}) must divide model.width ({width}), or give model.head_dim; "
                        f"try {', '.join(str(h) for h in range(1, heads + 4) if width % h == 0)}"
                    )
                content["head_dim"] = width // heads
            if content.get("ffn") is None:
                content["ffn"] = 4 * width
        else:  # complain of width and heads alone, not of what follows from them
            content = {"kv_heads": 1, "head_dim": 2, "ffn": 8, **{k: v for k, v in content.items() if v is not None}}
        return content

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.heads % self.kv_heads:
            raise ValueError(
                f"model.kv_heads ({self.kv_heads}) must divide model.heads ({self.heads}); "
                f"try {', '.join(str(k) for k in range(1, self.heads + 1) if self.heads % k == 0)}"
            )
        return self

    def padded_vocab(self, vocab: int) -> int:
        """``vocab`` rounded up to ``vocab_multiple``: a function of the model, never of its layout."""
        return -(-vocab // self.vocab_multiple) * self.vocab_multiple
