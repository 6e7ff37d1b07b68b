"""Parameters and FLOPs of a model from its configuration alone.

Conventions (recorded with every run): N counts non-embedding parameters, total and active; FLOPs count the matrix
products of forward and backward: projections, attention scores over the full square (not the causal half), router,
head over the padded vocabulary. Norms, softmax, rotary embedding and the embedding look-up are not counted.
tests/models/test_counts.py checks both against built models.
"""

from dataclasses import dataclass

from ..moe.config import MoEConfig
from ..parallel.topology import Topology
from .config import ModelConfig

CONVENTIONS = {
    "n": "non-embedding parameters; total counts every expert, active counts the routed experts a token visits, "
    "shared experts, router and norms",
    "d": "tokens seen in training",
    "flops": "matrix products of forward and backward (3 x forward) incl. attention scores, router and head; K visits "
    "a token, those beyond an expert's capacity included, rows that only pad it not",
    "causal_attention": "full",
    "g": "4 * width / expert_width (arXiv 2402.07871); arXiv 2507.17702 calls half of it G",
    "k": "routed experts a token visits (on average, where experts choose); shared experts are not counted in K or E",
    "s": "1 - K / E over routed experts",
}


@dataclass(frozen=True)
class ParameterCounts:
    """``total`` and ``active`` exclude ``embedding`` (which holds the head too when it is untied)."""

    total: int
    active: int
    embedding: int
    router: int

    @property
    def all(self) -> int:
        """Every parameter that is stored."""
        return self.total + self.embedding


@dataclass(frozen=True)
class HeldParameters:
    """What one rank holds: ``dense`` parameters are replicated over data ranks, ``expert`` ones over expert-data."""

    dense: int
    expert: int

    @property
    def all(self) -> int:
        return self.dense + self.expert


@dataclass(frozen=True)
class FlopCounts:
    """FLOPs a token. ``total`` is forward and backward; ``six_n`` is 6 N_active beside it."""

    attention: int
    feed_forward: int
    router: int
    head: int
    six_n: int

    @property
    def forward(self) -> int:
        return self.attention + self.feed_forward + self.router + self.head

    @property
    def total(self) -> int:
        """The backward pass multiplies each product's gradient with both of its factors: twice the forward pass."""
        return 3 * self.forward


def _cut_matrices(model: ModelConfig) -> int:
    """Parameters of a layer's attention that are cut over tensor ranks: all that have rows for heads."""
    query, mla = model.heads * model.head_dim, model.mla
    if mla is None:
        return model.width * (2 * query + 2 * model.kv_heads * model.head_dim)
    output = model.heads * mla.value_dim
    queries = query * (model.width if mla.q_rank is None else mla.q_rank)
    return queries + (model.heads * mla.nope_dim + output) * mla.kv_rank + output * model.width


def _whole_matrices(model: ModelConfig) -> int:
    """Parameters of a layer's attention that every tensor rank holds: the projections to latents."""
    mla = model.mla
    return 0 if mla is None else model.width * ((mla.q_rank or 0) + mla.kv_rank + mla.rope_dim)


def _attention_matrices(model: ModelConfig) -> int:
    return _cut_matrices(model) + _whole_matrices(model)


def _attention_norms(model: ModelConfig) -> int:
    if model.mla is not None:
        return (model.mla.q_rank or 0) + model.mla.kv_rank
    if model.qk_norm == "head":
        return 2 * model.head_dim
    if model.qk_norm == "full":
        return (model.heads + model.kv_heads) * model.head_dim
    return 0


def _attention_biases(model: ModelConfig) -> int:
    return (model.heads + 2 * model.kv_heads) * model.head_dim if model.qkv_bias else 0


def _expert(model: ModelConfig, moe: MoEConfig) -> int:
    return 3 * model.width * moe.width_of_expert(model.width)


def mixture_layers(model: ModelConfig, moe: MoEConfig | None) -> list[int]:
    """Global indices of the layers that are mixtures."""
    return [layer for layer in range(model.layers) if moe is not None and moe.is_mixture(layer)]


def count_parameters(model: ModelConfig, moe: MoEConfig | None, vocab: int) -> ParameterCounts:
    """Parameters by kind for a tokenizer of ``vocab`` pieces."""
    common = _attention_matrices(model) + _attention_norms(model) + _attention_biases(model) + 2 * model.width
    mixtures = len(mixture_layers(model, moe))
    total = active = model.layers * common + (model.layers - mixtures) * 3 * model.width * model.ffn + model.width
    router = 0
    if moe is not None:
        router = mixtures * model.width * moe.experts if moe.scored else 0
        total += router + mixtures * (moe.experts + moe.shared) * _expert(model, moe)
        active += router + mixtures * (moe.active + moe.shared) * _expert(model, moe)
    embedding = (1 if model.tied else 2) * model.padded_vocab(vocab) * model.width
    return ParameterCounts(total, active, embedding, router)


def layers_of_stage(model: ModelConfig, topology: Topology, stage: int) -> list[int]:
    """Global indices of the layers that a pipeline stage holds, of all its chunks."""
    rank = stage * topology.stage_ranks
    return [layer for chunk in range(topology.virtual_stages) for layer in topology.layers(rank, chunk, model.layers)]


def kinds_of_stage(model: ModelConfig, moe: MoEConfig | None, topology: Topology, stage: int) -> tuple[int, int]:
    """How many layers of a pipeline stage are dense, and how many are mixtures."""
    layers = layers_of_stage(model, topology, stage)
    mixtures = 0 if moe is None else sum(map(moe.is_mixture, layers))
    return len(layers) - mixtures, mixtures


def count_held(model: ModelConfig, moe: MoEConfig | None, vocab: int, topology: Topology, stage: int) -> HeldParameters:
    """Parameters on each rank of a pipeline stage: all its ranks hold equally many."""
    width, ranks = model.width, topology.tensor
    norms = _attention_norms(model) // (ranks if model.qk_norm == "full" else 1)
    attention = (_cut_matrices(model) + _attention_biases(model)) // ranks + _whole_matrices(model) + norms
    plain, mixtures = kinds_of_stage(model, moe, topology, stage)
    dense = (plain + mixtures) * (attention + 2 * width) + plain * (3 * width * model.ffn // ranks)
    expert = 0
    if moe is not None:
        # Every tensor rank holds the whole router and the whole of the shared experts.
        dense += mixtures * ((width * moe.experts if moe.scored else 0) + moe.shared * _expert(model, moe))
        expert = mixtures * (moe.experts // topology.expert) * _expert(model, moe)
    vocabulary = model.padded_vocab(vocab) * width // ranks
    first, last = stage == 0, stage == topology.pipeline - 1
    copies = int(first) + int(last and (not model.tied or not first))  # a tied head is a copy on a stage of its own
    return HeldParameters(dense + copies * vocabulary + (width if last else 0), expert)


def flops_per_token(model: ModelConfig, moe: MoEConfig | None, vocab: int, seq: int) -> FlopCounts:
    """FLOPs a token at sequence length ``seq``; the parts are those of the forward pass."""
    mixtures = len(mixture_layers(model, moe))
    value = model.head_dim if model.mla is None else model.mla.value_dim
    scores = 2 * seq * model.heads * (model.head_dim + value)  # q k^T and p v
    feed_forward = (model.layers - mixtures) * 2 * 3 * model.width * model.ffn
    router = 0
    if moe is not None:
        feed_forward += mixtures * 2 * (moe.active + moe.shared) * _expert(model, moe)
        router = mixtures * 2 * model.width * moe.experts if moe.scored else 0
    return FlopCounts(
        attention=model.layers * (2 * _attention_matrices(model) + scores),
        feed_forward=feed_forward,
        router=router,
        head=2 * model.padded_vocab(vocab) * model.width,
        six_n=6 * count_parameters(model, moe, vocab).active,
    )
