"""The sections ``model.mla`` and ``model.yarn``: latent attention, and rotary positions stretched to longer texts."""

from typing import Self

from pydantic import BaseModel, Field, model_validator


class MLAConfig(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """Multi-head latent attention (DeepSeek-V2, 2405.04434, section 2.1).

    Keys and values of all heads are made from one latent vector of each token, and so may queries be. Of a head's
    features the last ``rope_dim`` turn with the position; those of the key are the same in all heads.
    """

    q_rank: int | None = Field(None, ge=1, description="width of the queries' latent; none: made straight from tokens")
    kv_rank: int = Field(ge=1, description="width of the latent of keys and values")
    nope_dim: int = Field(ge=2, multiple_of=2, description="features of a head's query and key without position")
    rope_dim: int = Field(ge=2, multiple_of=2, description="features of a head's query and key that rotate")
    value_dim: int = Field(ge=1, description="features of a head's value")
    norm_eps: float = Field(1e-6, gt=0, description="what the norms of the latents add; DeepSeek's differs from others")

    @property
    def head_dim(self) -> int:
        """Features of a head's query and key."""
        return self.nope_dim + self.rope_dim


class YarnConfig(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """YaRN (2309.00071): features that turn slowly are slowed down by ``factor``, fast ones left as they were.

    With m(s) = 0.1 s ln(factor) + 1, turned features are multiplied by m(mscale) / m(mscale_all_dim), and all scores by
    m(mscale_all_dim)^2, as DeepSeek-V2 and V3 do (2405.04434, section 3.1.4).
    """

    factor: float = Field(ge=1, description="how many times longer texts may be")
    original_seq: int = Field(ge=1, description="longest sequence that the model was trained on before")
    beta_fast: float = Field(32.0, gt=0, description="features with more turns over original_seq stay")
    beta_slow: float = Field(1.0, gt=0, description="features with fewer turns are slowed down by the whole factor")
    mscale: float = Field(1.0, ge=0)
    mscale_all_dim: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.beta_fast <= self.beta_slow:
            raise ValueError(
                f"model.yarn.beta_fast ({self.beta_fast:g}) must exceed model.yarn.beta_slow ({self.beta_slow:g}); "
                "the paper has 32 and 1"
            )
        return self
