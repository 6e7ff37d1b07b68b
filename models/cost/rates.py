"""Time of a run on CPU, from throughputs that were measured.

They come from ``moescale study run`` on two cores of a Xeon with AVX-512, one thread a run; other machines differ by a
factor, so that times are for planning, not for judging.
"""

from dataclasses import dataclass

import numpy as np

from ...moe.config import MoEConfig
from ...parallel.topology import Topology
from ..config import ModelConfig
from ..counts import flops_per_token
from .memory import Workload, fullest_bytes

# Sustained GFLOP/s of one thread by model width, optimizer and bookkeeping included (docs/findings.md).
_WIDTHS = (16, 32, 48, 64, 96, 128, 192, 256, 512)
_GFLOPS = (5.5, 11.0, 15.0, 20.0, 28.0, 36.0, 48.0, 55.0, 62.0)
# Fine experts make small products: throughput of a mixture over that of a dense model of the same width.
_MIXTURE = 0.75
# Of three passes (forward, and backward worth two) the first is done twice.
_RECOMPUTED = 4 / 3


@dataclass(frozen=True)
class Cost:
    """``memory_bytes`` of the fullest rank on top of what imports take; ``seconds`` of training on CPU."""

    memory_bytes: int
    seconds: float


def estimate(model: ModelConfig, moe: MoEConfig | None, vocab: int, work: Workload, topology: Topology) -> Cost:
    """Cost of training ``work.steps`` steps."""
    flops = flops_per_token(model, moe, vocab, work.seq).total * work.batch_tokens * work.steps
    rate = float(np.interp(model.width, _WIDTHS, _GFLOPS)) * 1e9 * (_MIXTURE if moe is not None else 1.0)
    seconds = flops / rate / topology.world * (_RECOMPUTED if work.recompute else 1.0)
    return Cost(memory_bytes=fullest_bytes(model, moe, vocab, work, topology), seconds=seconds)
