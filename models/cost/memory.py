"""Memory of a rank, counted tensor by tensor for our engine settings (ZeRO 1 with fp32 accumulation, or 0)."""

from dataclasses import dataclass

from ...moe.config import MoEConfig
from ...parallel.topology import Topology
from ..config import ModelConfig
from ..counts import HeldParameters, count_held, kinds_of_stage

# Elements that DeepSpeed copies together to reduce them under ZeRO 0: its own default.
LARGEST_UNPARTITIONED_BUCKET = 500_000_000


@dataclass(frozen=True)
class Workload:
    """What a rank works on: sequences at once, tokens in each, steps, tokens in a global batch.

    ``moments``: fp32 numbers that the optimizer keeps for a parameter besides its master. ``zero``: the ZeRO stage.
    ``recompute``: layers keep their input alone, and are computed again for the backward pass.
    """

    micro_batch: int
    seq: int
    steps: int
    batch_tokens: int
    dtype: str
    zero: int
    moments: int
    recompute: bool = False


def fullest_bytes(model: ModelConfig, moe: MoEConfig | None, vocab: int, work: Workload, topology: Topology) -> int:
    """Memory of the fullest rank, bytes."""
    return max(rank_bytes(model, moe, vocab, work, topology, stage) for stage in range(topology.pipeline))


def rank_bytes(
    model: ModelConfig, moe: MoEConfig | None, vocab: int, work: Workload, topology: Topology, stage: int
) -> int:
    """Memory of each rank of a pipeline stage, bytes."""
    held = count_held(model, moe, vocab, topology, stage)
    return state_bytes(held, work, topology) + activation_bytes(model, moe, vocab, work, topology, stage)


def state_bytes(held: HeldParameters, work: Workload, topology: Topology) -> int:
    """Parameters, gradients, masters and moments of a rank that holds ``held``, bytes."""
    if work.zero == 0:  # fp32 throughout; the parameters are their own masters
        return held.all * (8 + 4 * work.moments) + 4 * min(held.all, LARGEST_UNPARTITIONED_BUCKET)
    size = 2 if work.dtype == "bf16" else 4
    # Weights in the model's dtype; gradients in fp32; what DeepSpeed copies to reduce them, in the model's dtype.
    replicated = held.all * (size + 4 + size)
    # Master, moments, and the flat fp32 gradient of the rank's own partition.
    owned = held.dense / topology.data + held.expert / topology.expert_data
    return int(replicated + owned * (8 + 4 * work.moments))


def activation_bytes(
    model: ModelConfig, moe: MoEConfig | None, vocab: int, work: Workload, topology: Topology, stage: int
) -> int:
    """What forward keeps for backward on a pipeline stage, at its peak (on the last one: the loss), bytes."""
    size = 2 if work.dtype == "bf16" else 4
    tokens = work.micro_batch * work.seq
    common = 4 * model.width + _attention_elements(model)  # residual and normed input twice
    # Gate and up, and what the allocator holds beside for one layer at a time: measured.
    dense = common + 3.5 * model.ffn
    mixture = 0.0
    if moe is not None:
        width = moe.width_of_expert(model.width)
        padding = moe.capacity if moe.padded and moe.capacity is not None else 1.0
        rows = moe.active * padding + moe.shared
        mixture = common + rows * (2 * model.width + 3 * width) + (6 * moe.experts if moe.scored else 0)
    plain, mixtures = kinds_of_stage(model, moe, topology, stage)
    held = (plain + mixtures) * model.width if work.recompute else plain * dense + mixtures * mixture
    held *= _in_flight(topology, stage)
    if work.recompute:  # of one micro-batch a layer at a time is there whole
        held += max(dense if plain else 0, mixture if mixtures else 0)
    layers = held * tokens * size / (topology.tensor if topology.sequence else 1)
    if stage < topology.pipeline - 1:
        return int(layers)
    logits = 4 * tokens * model.padded_vocab(vocab) * 4 / topology.tensor  # logits, exp, softmax, gradient: fp32
    return int(layers + logits)


def _attention_elements(model: ModelConfig) -> int:
    """Numbers that a layer's attention keeps of a token."""
    query, mla = model.heads * model.head_dim, model.mla
    if mla is None:  # q, k, v before and after rotation; output
        return 3 * query + 5 * model.kv_heads * model.head_dim
    # Latents before and after their norms; q and k; v; output before and behind the kernel.
    return 2 * ((mla.q_rank or 0) + mla.kv_rank) + 2 * query + 3 * model.heads * mla.value_dim


def _in_flight(topology: Topology, stage: int) -> float:
    """Micro-batches whose activations a stage holds under (interleaved) 1F1B (2104.04473, section 2.2)."""
    behind, chunks = topology.pipeline - 1 - stage, topology.virtual_stages
    return behind + 1 if chunks == 1 else (2 * behind + (chunks - 1) * topology.pipeline + 1) / chunks
