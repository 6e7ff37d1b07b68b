"""Model shapes and batches of the benchmark ``step``."""

from dataclasses import dataclass

from ..models.config import ModelConfig
from ..models.counts import flops_per_token
from ..moe.config import MoEConfig


@dataclass(frozen=True)
class Case:
    """A model and its batch; ``experts`` 0 is a dense model, whose feed-forward width is ``ffn``.

    Mixtures normalise queries and keys over all heads, because OLMoE does.
    """

    name: str
    dtype: str
    threads: int
    width: int
    layers: int
    heads: int
    ffn: int
    vocab: int
    seq: int
    batch: int
    experts: int = 0
    active: int = 0
    expert_width: int = 0

    @property
    def tokens(self) -> int:
        return self.batch * self.seq

    def model(self) -> ModelConfig:
        return ModelConfig.model_validate(
            {
                "layers": self.layers,
                "width": self.width,
                "heads": self.heads,
                "ffn": self.ffn,
                "qk_norm": "full" if self.experts else "none",
            }
        )

    def moe(self) -> MoEConfig | None:
        if not self.experts:
            return None
        return MoEConfig.model_validate(
            {"experts": self.experts, "active": self.active, "expert_width": self.expert_width}
        )

    @property
    def flops(self) -> int:
        """Matrix products of a step, forward and backward."""
        return flops_per_token(self.model(), self.moe(), self.vocab, self.seq).total * self.tokens


def _both(name: str, **keys: int) -> list[Case]:
    common = {"threads": 2, "width": 128, "layers": 4, "heads": 4, "ffn": 512, "vocab": 4096, "seq": 256, "batch": 16}
    return [Case(name=name, dtype=dtype, **{**common, **keys}) for dtype in ("fp32", "bf16")]


# The rung d48, where the quickstart compares families: one thread to a run.
_LADDER = {"threads": 1, "width": 48, "layers": 2, "heads": 2, "ffn": 192, "vocab": 1024, "seq": 128, "batch": 4}

# For a GPU: as much arithmetic in a step as keeps one busy.
_GPU = {"threads": 1, "width": 1024, "layers": 8, "heads": 16, "ffn": 4096, "vocab": 4096, "seq": 2048, "batch": 4}

# All of d 128 activate 512 hidden units a token in their feed-forward layers.
CASES = [
    Case("tiny", "fp32", **_LADDER),
    Case("quickstart", "fp32", **_LADDER, experts=32, active=4, expert_width=48),
    *_both("dense"),
    *_both("moe", experts=8, active=2, expert_width=256),
    *_both("moe64", experts=64, active=8, expert_width=64),
    *_both("moe256", width=256, heads=8, ffn=1024, experts=8, active=2, expert_width=512),
    Case("dense1024", "bf16", **_GPU),
    Case("moe1024", "bf16", **_GPU, experts=64, active=8, expert_width=512),
]
DEFAULT = ("tiny", "quickstart", "dense", "moe", "moe64")
