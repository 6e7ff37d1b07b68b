"""What a run costs before it starts: memory of the fullest rank and wall time.

Memory is counted tensor by tensor for our engine setting (ZeRO 1, fp32 accumulation). Time on CPU comes from
throughputs measured with ``moescale study run`` on two cores of a Xeon with AVX-512, one thread a run; other machines
differ by a factor, so that times are for planning, not for judging.
"""

from dataclasses import dataclass

import numpy as np

from ..moe.config import MoEConfig
from ..parallel.topology import Topology
from .config import ModelConfig
from .counts import count_parameters, flops_per_token, mixture_layers

# Sustained GFLOP/s of one thread by model width, optimizer and bookkeeping included (docs/findings.md).
_WIDTHS = (16, 32, 48, 64, 96, 128, 192, 256, 512)
_GFLOPS = (5.5, 11.0, 15.0, 20.0, 28.0, 36.0, 48.0, 55.0, 62.0)
# Fine experts make small products: throughput of a mixture over that of a dense model of the same width.
_MIXTURE = 0.75


@dataclass(frozen=True)
class Cost:
    """``memory_bytes`` of the fullest rank on top of what imports take; ``seconds`` of training on CPU."""

    memory_bytes: int
    seconds: float


@dataclass(frozen=True)
class Workload:
    """What a rank works on: sequences at once, tokens in each, steps, tokens in a global batch."""

    micro_batch: int
    seq: int
    steps: int
    batch_tokens: int
    dtype: str


def estimate(model: ModelConfig, moe: MoEConfig | None, vocab: int, work: Workload, topology: Topology) -> Cost:
    """Cost of training ``work.steps`` steps."""
    flops = flops_per_token(model, moe, vocab, work.seq).total * work.batch_tokens * work.steps
    rate = float(np.interp(model.width, _WIDTHS, _GFLOPS)) * 1e9 * (_MIXTURE if moe is not None else 1.0)
    memory = state_bytes(model, moe, vocab, work.dtype, topology) + activation_bytes(model, moe, vocab, work, topology)
    return Cost(memory_bytes=memory, seconds=flops / rate / topology.world)


def state_bytes(model: ModelConfig, moe: MoEConfig | None, vocab: int, dtype: str, topology: Topology) -> int:
    """Parameters, gradients, masters and Adam's moments of a rank, bytes."""
    counts = count_parameters(model, moe, vocab)
    size = 2 if dtype == "bf16" else 4
    expert = 0
    if moe is not None:
        expert = len(mixture_layers(model, moe)) * moe.experts * 3 * model.width * moe.width_of_expert(model.width)
    share = 1 / (topology.tensor * topology.pipeline)
    dense_here = (counts.all - expert) * share
    expert_here = expert / (topology.expert * topology.pipeline)
    # Weights in the model's dtype; gradients in fp32; DeepSpeed's reduction bucket in the model's dtype.
    replicated = (dense_here + expert_here) * (size + 4 + size)
    # Master, two moments, and the flat fp32 gradient of the rank's own partition.
    owned = dense_here / topology.data + expert_here / topology.expert_data
    return int(replicated + owned * 16)


def activation_bytes(model: ModelConfig, moe: MoEConfig | None, vocab: int, work: Workload, topology: Topology) -> int:
    """What forward keeps for backward, at its peak (the loss), bytes."""
    size = 2 if work.dtype == "bf16" else 4
    tokens = work.micro_batch * work.seq
    query, keys = model.heads * model.head_dim, model.kv_heads * model.head_dim
    # Residual and normed input twice; q, k, v before and after rotation; attention output.
    common = 4 * model.width + 3 * query + 5 * keys
    # Gate and up, and what the allocator holds beside for one layer at a time: measured.
    dense = 3.5 * model.ffn
    elements = 0.0
    for layer in range(model.layers // topology.pipeline):
        if moe is not None and moe.is_mixture(layer):
            width = moe.width_of_expert(model.width)
            padding = moe.capacity if moe.padded and moe.capacity is not None else 1.0
            rows = moe.active * padding + moe.shared
            scores = 6 * moe.experts if moe.scored else 0
            elements += common + rows * (2 * model.width + 3 * width) + scores
        else:
            elements += common + dense
    # Micro-batches whose activations the first stage of (interleaved) 1F1B holds (2104.04473, section 2.2).
    stages, chunks = topology.pipeline, topology.virtual_stages
    in_flight = stages if chunks == 1 else stages + (stages - 1) / chunks
    layers = elements * tokens * size / (topology.tensor if topology.sequence else 1) * in_flight
    logits = 4 * tokens * model.padded_vocab(vocab) * 4 / topology.tensor  # logits, exp, softmax, gradient: fp32
    return int(layers + logits)
