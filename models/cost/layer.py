"""Time of one layer on one rank, forward and backward, by what the time goes into."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ...moe.config import MoEConfig
from ...parallel.topology import Topology
from ..config import ModelConfig
from .hardware import Hardware
from .products import BYTES, attention_seconds, matrix_seconds

Part = Literal[
    "products", "attention", "memory", "tensor", "exchange in nodes", "exchange between nodes", "pipeline bubble",
    "pipeline messages", "recomputation", "gradient reduction", "optimizer",
]  # fmt: skip

# Operations of a forward pass besides products and attention: norms, rotation, residuals; SwiGLU; scores, top-k,
# losses, permutation and combination. The backward pass has twice as many.
_CALLS_COMMON, _CALLS_DENSE, _CALLS_MIXTURE = 10, 1, 16
# Passes over the fp32 scores of a token: softmax, top-k, load-balance and z-loss.
_SCORE_PASSES = 6
# Bytes that the loss moves for each logit: the product's own is written and read (bf16: 4), fp32 made of it (4),
# maximum, exponentials and sum (4 passes of 4), and the gradient read, scaled and written (3 of 4).
_LOGIT_BYTES = 36


class Pass(NamedTuple):
    """Seconds of a forward and of a backward pass."""

    forward: dict[Part, float]
    backward: dict[Part, float]


@dataclass(frozen=True)
class Place:
    """Where a micro-batch of ``tokens`` is computed."""

    topology: Topology
    hardware: Hardware
    dtype: str
    tokens: int
    seq: int

    @property
    def own(self) -> float:
        """Tokens that this rank keeps between products: its share, under sequence parallelism."""
        return self.tokens / (self.topology.tensor if self.topology.sequence else 1)

    def inside(self, ranks: int, stride: int) -> int:
        """How many of ``ranks``, ``stride`` apart, share a node."""
        node = self.topology.node_ranks or self.topology.world
        return max(min(ranks, node // stride), 1)


def total(passes: Iterable[dict[Part, float]]) -> dict[Part, float]:
    """Parts of all ``passes`` together."""
    found: dict[Part, float] = {}
    for parts in passes:
        for part, seconds in parts.items():
            found[part] = found.get(part, 0.0) + seconds
    return found


def layer_pass(model: ModelConfig, moe: MoEConfig | None, place: Place) -> Pass:
    """A dense layer (``moe`` None) or a mixture, its attention included."""
    attention = _attention(model, place)
    rest = _dense(model, place) if moe is None else _mixture(model, moe, place)
    return Pass(total([attention.forward, rest.forward]), total([attention.backward, rest.backward]))


def head_pass(model: ModelConfig, vocab: int, place: Place) -> Pass:
    """The head over the padded vocabulary, and the loss."""
    columns = model.padded_vocab(vocab) / place.topology.tensor
    forward, backward = matrix_seconds(place.tokens, model.width, columns, place.hardware, place.dtype)
    loss = place.tokens * columns * _LOGIT_BYTES / place.hardware.memory
    shared = _tensor_collective(model.width, place)
    return Pass(
        {"products": forward, "memory": 2 / 3 * loss, "tensor": shared},
        {"products": backward, "memory": 1 / 3 * loss, "tensor": 2 * shared},
    )


def _attention(model: ModelConfig, place: Place) -> Pass:
    tensor, hardware, mla = place.topology.tensor, place.hardware, model.mla
    query, width = model.heads * model.head_dim / tensor, model.width
    matrices: list[tuple[float, float, float]]
    if mla is None:
        kept = query + 2 * model.kv_heads * model.head_dim / tensor
        matrices = [(place.tokens, width, kept), (place.tokens, query, width)]
        value = model.head_dim
    else:
        value, output = mla.value_dim, model.heads * mla.value_dim / tensor
        keys = model.heads * mla.nope_dim / tensor
        matrices = [(place.own, width, mla.kv_rank + mla.rope_dim), (place.tokens, mla.kv_rank, keys + output)]
        matrices += [(place.own, width, mla.q_rank)] if mla.q_rank is not None else []
        matrices += [(place.tokens, mla.q_rank or width, query), (place.tokens, output, width)]
        kept = 2 * query + output
    forward, backward = _matrices(matrices, place)
    kernel = attention_seconds(
        place.tokens, place.seq, model.heads / tensor, model.head_dim + value, hardware, place.dtype
    )
    # Two norms read and write, two residual sums read twice and write; rotation reads and writes what it turns.
    moved = _moved(place.own * 10 * width + place.tokens * 2 * kept, _CALLS_COMMON, place)
    # Gathered before, summed and scattered behind; the backward pass does the reverse, and gathers the input once more
    # for the gradients of weights (2205.05198, section 4.2.2).
    shared = 2 * _tensor_collective(width, place)
    return Pass(
        {"products": forward, "attention": kernel[0], "memory": moved, "tensor": shared},
        {"products": backward, "attention": kernel[1], "memory": 2 * moved, "tensor": 1.5 * shared},
    )


def _dense(model: ModelConfig, place: Place) -> Pass:
    hidden = model.ffn / place.topology.tensor
    forward, backward = _matrices([(place.tokens, model.width, 2 * hidden), (place.tokens, hidden, model.width)], place)
    moved = _moved(place.tokens * 3 * hidden, _CALLS_DENSE, place)
    shared = 2 * _tensor_collective(model.width, place)
    return Pass(
        {"products": forward, "memory": moved, "tensor": shared},
        {"products": backward, "memory": 2 * moved, "tensor": 1.5 * shared},
    )


def _mixture(model: ModelConfig, moe: MoEConfig, place: Place) -> Pass:
    """Loads are taken to be equal: what routing adds to the busiest rank is not foreseen."""
    width, hidden, hardware = model.width, moe.width_of_expert(model.width), place.hardware
    padding = moe.capacity if moe.padded and moe.capacity is not None else 1.0
    visits = moe.active * padding
    here = moe.experts // place.topology.expert
    rows = place.own * visits / here
    forward, backward = map(sum, zip(
        matrix_seconds(rows, width, 2 * hidden, hardware, place.dtype, here),
        matrix_seconds(rows, hidden, width, hardware, place.dtype, here),
        *([matrix_seconds(place.own, width, moe.experts, hardware, "fp32")] if moe.scored else []),
        *([matrix_seconds(place.own, width, 2 * moe.shared * hidden, hardware, place.dtype),
           matrix_seconds(place.own, moe.shared * hidden, width, hardware, place.dtype)] if moe.shared else []),
        strict=True,
    ))  # fmt: skip
    scores = _SCORE_PASSES * moe.experts * 4 / BYTES[place.dtype] if moe.scored else 0
    # Rows are read and written on their way out; on their way back read, and written once a token.
    each = 3 * visits * width + width + 3 * (visits + moe.shared) * hidden + scores
    moved = _moved(place.own * each, _CALLS_MIXTURE, place)
    near, far = _exchange(place.own * visits * width * BYTES[place.dtype], place)
    parts: dict[Part, float] = {"exchange in nodes": near, "exchange between nodes": far}
    return Pass(
        {"products": forward, "memory": moved, **parts},
        {"products": backward, "memory": 2 * moved, **parts},
    )


def _exchange(size: float, place: Place) -> tuple[float, float]:
    """Seconds of the two all-to-alls of a pass, there and back. Inside and between nodes overlap: the longer counts."""
    topology = place.topology
    stride = topology.tensor if topology.experts_on_all_tensor_ranks else 1
    inside = place.inside(topology.expert, stride)
    near, far = place.hardware.exchange(size, topology.expert, inside)
    return (2 * near, 0.0) if near > far else (0.0, 2 * far)


def _tensor_collective(width: int, place: Place) -> float:
    """Seconds of one all-gather or reduce-scatter of the tokens over tensor ranks."""
    ranks = place.topology.tensor
    if ranks == 1:
        return 0.0
    inside = place.inside(ranks, 1)
    size = place.tokens * width * BYTES[place.dtype]
    return ring_seconds(size, ranks, inside, place.hardware)


def ring_seconds(size: float, ranks: int, inside: int, hardware: Hardware) -> float:
    """Seconds of an all-gather or reduce-scatter of ``size`` bytes: each rank passes on all but its own share."""
    if ranks == 1:
        return 0.0
    return size * (ranks - 1) / ranks / hardware.link(ranks, inside) + hardware.latency(ranks, inside)


def _matrices(matrices: Iterable[tuple[float, float, float]], place: Place) -> tuple[float, float]:
    """Forward and backward of weights, given as (rows, inner, outer)."""
    pairs = [matrix_seconds(*matrix, place.hardware, place.dtype) for matrix in matrices]
    return sum(forward for forward, _ in pairs), sum(backward for _, backward in pairs)


def _moved(elements: float, calls: int, place: Place) -> float:
    return elements * BYTES[place.dtype] / place.hardware.memory + calls * place.hardware.call
