"""Mixture layers of the benchmarks ``moe`` and ``dispatch``."""

from dataclasses import dataclass
from typing import Any, Literal

from ..moe.config import MoEConfig


@dataclass(frozen=True)
class LayerCase:
    """A layer and its batch. ``compare`` says with what: other implementations, or ours under other loads."""

    name: str
    dtype: str
    threads: int
    experts: int
    active: int
    expert_width: int
    width: int = 512
    seq: int = 512
    batch: int = 8
    compare: Literal["peers", "routing"] = "peers"

    @property
    def tokens(self) -> int:
        return self.batch * self.seq

    def moe(self, routing: str = "natural") -> MoEConfig:
        """The mixture that ours and all peers can be: selected weights add up to 1, nothing is dropped.

        Args:
            routing: ``natural`` as the router decides, ``uniform`` at random, ``skew`` at random with Zipf's chances.
        """
        keys = {"experts": self.experts, "active": self.active, "expert_width": self.expert_width}
        if routing == "natural":
            return MoEConfig.model_validate({**keys, "score": "softmax_normalized", "balance": "micro_batch"})
        return MoEConfig.model_validate({**keys, "router": "forced", "skew": 1.0 if routing == "skew" else 0.0})


def _all(name: str, experts: int, active: int, expert_width: int, **more: Any) -> list[LayerCase]:
    return [
        LayerCase(name, dtype, threads, experts, active, expert_width, **more)
        for dtype in ("fp32", "bf16")
        for threads in (1, 2)
    ]


CASES = [
    LayerCase("tiny", "fp32", threads=1, experts=4, active=2, expert_width=16, width=32, seq=32, batch=4),
    *_all("e8", experts=8, active=2, expert_width=1024),
    *_all("e64", experts=64, active=2, expert_width=1024),
    *_all("e256", experts=256, active=8, expert_width=256),
    # Layers of published models at the batch of a GPU: OLMoE-1B-7B (2409.02060), Qwen3-30B-A3B (2505.09388).
    LayerCase("olmoe", "bf16", threads=1, experts=64, active=8, expert_width=1024, width=2048, seq=4096, batch=4),
    LayerCase("qwen3", "bf16", threads=1, experts=128, active=8, expert_width=768, width=2048, seq=4096, batch=4),
    *_all("e64-routing", experts=64, active=2, expert_width=1024, compare="routing"),
]
DEFAULT = ("e8", "e64", "e256", "e64-routing")
