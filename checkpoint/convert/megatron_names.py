"""Megatron-core's names for the tensors of a GPT, and the logical tensors that each is fused of.

A model's global tensors, as its ``sharded_state_dict`` calls them in megatron-core 0.16 (L layers, E experts; what is
cut over ranks is put together again by the checkpoint, so no rank appears):

    embedding.word_embeddings.weight [V, D]   output_layer.weight [V, D]   decoder.final_layernorm.weight [D]
    decoder.layers.self_attention.linear_qkv.weight [L, (H + 2 Hkv) d, D]  for each group: queries, key, value
    decoder.layers.mlp.linear_fc1.weight [L, 2 F, D]                        gate over up
    decoder.layers.mlp.experts.experts.linear_fc1.weight [L, E, 2 F, D]     of every kind of expert module
    decoder.layers.self_attention.linear_kv_up_proj.weight [L, H (n + v), R]   of latent attention, each alone
    ...

There are variants, all of which are read. Layers that differ are kept apart, ``decoder.layers.3.mlp...``, without the
first dimension; so may experts be, ``experts.experts.7.linear_fc1``, and then gate and up are two tensors, ``weight_w``
and ``weight_v``. Norms go by the name that Transformer Engine fuses them under, ``linear_qkv.layer_norm_weight``, under
local specs too; the norm before a mixture and those of latent attention have one name under each.
"""

from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...models.mla_config import MLAConfig
from .formats import Architecture

Logical = tuple[str, str]  # (part, logical name)
LAYERS = "decoder.layers."
_EXPERTS = "mlp.experts.experts."


@dataclass(frozen=True)
class Item:
    """A tensor of one layer, and of one expert where there are experts, as it is before layers are stacked.

    Attributes:
        suffixes: names behind the layer's (or whole names, outside layers) that it is read by.
        members: the logical tensors that it is fused of.
        fuse, part: put it together; take member i out of it.
        layer, expert: None outside layers and experts.
        written: under how many of its names it is written.
        padded: it may have any number of rows that holds the vocabulary.
    """

    suffixes: tuple[str, ...]
    shape: tuple[int, ...]
    members: tuple[Logical, ...]
    fuse: Callable[[list[Tensor]], Tensor]
    part: Callable[[Tensor, int], Tensor]
    layer: int | None = None
    expert: int | None = None
    written: int = 1
    padded: bool = False


@dataclass(frozen=True)
class Place:
    """Where an item lies in a global tensor.

    Attributes:
        leading: indices before the item's own dimensions: layer, expert, both or none.
        counts: how many there are of each.
        extent: the rest of the global tensor's shape.
        member: the one member that lies there; None: the whole item.
    """

    name: str
    leading: tuple[int, ...]
    counts: tuple[int, ...]
    extent: tuple[int, ...]
    member: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the global tensor."""
        return (*self.counts, *self.extent)


class Naming:
    """The tensors of a model.

    Attributes:
        stacked: whether Megatron stacks its layers: all are alike.
    """

    def __init__(self, architecture: Architecture):
        self.model, self.moe = architecture.model, architecture.moe
        self.rows = self.model.padded_vocab(architecture.vocab)
        self.mixtures = [self.moe is not None and self.moe.is_mixture(n) for n in range(self.model.layers)]
        self.stacked = len(set(self.mixtures)) == 1

    def items(self) -> Iterator[Item]:
        """Every tensor of the model, layer by layer."""
        vocabulary = (self.rows, self.model.width)
        yield _single("embedding.word_embeddings.weight", vocabulary, "embedding", padded=True)
        yield _single("decoder.final_layernorm.weight", vocabulary[1:], "final_norm")
        if not self.model.tied:
            yield _single("output_layer.weight", vocabulary, "head", padded=True)
        for layer, mixture in enumerate(self.mixtures):
            items = [*self._attention(f"layers.{layer}."), *self._feed_forward(f"layers.{layer}.", mixture)]
            yield from (replace(item, layer=layer) for item in items)

    def written_at(self, item: Item) -> list[Place]:
        """Where an item is written: stacked as far as Megatron stacks it."""
        if item.layer is None:
            return [Place(item.suffixes[0], (), (), item.shape)]
        return [self._place(item, suffix, self.stacked) for suffix in item.suffixes[: item.written]]

    def read_at(self, item: Item, tensors: Container[str]) -> list[list[Place]]:
        """Where an item lies among ``tensors``: for each of its names that is there, the places that make it up.

        There is more than one name where it is stored twice, which is for the caller to compare.
        """
        if item.layer is None:
            return [[Place(item.suffixes[0], (), (), item.shape)]] if item.suffixes[0] in tensors else []
        found = []
        for suffix in item.suffixes:
            for stacked in (True, False):
                for place in self._spellings(item, suffix, stacked):
                    halves = _halves(place)
                    if place.name in tensors:
                        found.append([place])
                    elif halves and all(half.name in tensors for half in halves):
                        found.append(halves)
        return found

    def _spellings(self, item: Item, suffix: str, stacked: bool) -> Iterator[Place]:
        """With its experts stacked and apart."""
        place = self._place(item, suffix, stacked)
        yield place
        if item.expert is not None:
            name = place.name.replace(_EXPERTS, f"{_EXPERTS}{item.expert}.")
            yield replace(place, name=name, leading=place.leading[:-1], counts=place.counts[:-1])

    def _place(self, item: Item, suffix: str, stacked: bool) -> Place:
        leading: tuple[int, ...] = ()
        counts: tuple[int, ...] = ()
        if stacked and item.layer is not None:
            leading, counts = (item.layer,), (self.model.layers,)
        if item.expert is not None:
            assert self.moe is not None
            leading, counts = (*leading, item.expert), (*counts, self.moe.experts)
        return Place(LAYERS + ("" if stacked else f"{item.layer}.") + suffix, leading, counts, item.shape)

    def _attention(self, prefix: str) -> Iterator[Item]:
        model = self.model
        if model.mla is not None:
            yield from self._latents(prefix, model.mla)
            return
        groups, queries, d = model.kv_heads, model.heads // model.kv_heads, model.head_dim
        rows = (queries + 2) * groups * d
        norms = ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight")
        yield _single(norms, (model.width,), f"{prefix}attention_norm")
        yield _qkv("weight", (rows, model.width), [f"{prefix}attention.{n}" for n in "qkv"], groups, queries)
        if model.qkv_bias:
            yield _qkv("bias", (rows,), [f"{prefix}attention.{n}_bias" for n in "qkv"], groups, queries)
        yield _single("self_attention.linear_proj.weight", (model.width, model.heads * d), f"{prefix}attention.o")
        if model.qk_norm == "head":
            for name in "qk":
                yield _single(f"self_attention.{name}_layernorm.weight", (d,), f"{prefix}attention.{name}_norm")

    def _latents(self, prefix: str, mla: MLAConfig) -> Iterator[Item]:
        """Latent attention; Transformer Engine has the norms of latents in the projections behind them."""
        width, heads = self.model.width, self.model.heads
        yield _single("input_layernorm.weight", (width,), f"{prefix}attention_norm")
        shapes: dict[str, tuple[int, ...]] = {"q_proj": (heads * mla.head_dim, width)}
        if mla.q_rank is not None:
            shapes = {"q_down_proj": (mla.q_rank, width), "q_up_proj": (heads * mla.head_dim, mla.q_rank)}
        shapes["kv_down_proj"] = (mla.kv_rank + mla.rope_dim, width)
        shapes["kv_up_proj"] = (heads * (mla.nope_dim + mla.value_dim), mla.kv_rank)
        for name, shape in shapes.items():
            logical = f"{prefix}attention.{name.removesuffix('_proj')}"
            if name.endswith("up_proj"):
                kind = name.split("_")[0]
                norms = (f"self_attention.{kind}_layernorm.weight", f"self_attention.linear_{name}.layer_norm_weight")
                yield replace(_single(norms, shape[1:], f"{prefix}attention.{kind}_norm"), written=2)
            yield _single(f"self_attention.linear_{name}.weight", shape, logical)
        yield _single("self_attention.linear_proj.weight", (width, heads * mla.value_dim), f"{prefix}attention.o")

    def _feed_forward(self, prefix: str, mixture: bool) -> Iterator[Item]:
        model, moe = self.model, self.moe
        fused, apart = "mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"
        norm = _single((apart, fused) if mixture else (fused, apart), (model.width,), f"{prefix}ffn_norm")
        # Which of them Megatron asks for depends on its layer spec, except where all specs fuse it.
        yield replace(norm, written=2) if mixture or model.mla is not None else norm
        if not mixture or moe is None:
            yield from _swiglu("mlp.", f"{prefix}ffn.", model.width, model.ffn)
            return
        prefix, hidden = f"{prefix}moe.", moe.width_of_expert(model.width)
        yield _single("mlp.router.weight", (moe.experts, model.width), f"{prefix}router")
        if moe.bias_rate:
            yield _single("mlp.router.expert_bias", (moe.experts,), f"{prefix}bias", part="buffer")
        if moe.shared:
            yield from _swiglu("mlp.shared_experts.", f"{prefix}shared.", model.width, moe.shared * hidden)
        for expert in range(moe.experts):
            for item in _swiglu(_EXPERTS, f"{prefix}experts.{expert}.", model.width, hidden):
                yield replace(item, expert=expert)

    def extra_states(self) -> Iterator[str]:
        """Names of the empty objects that Megatron's layers ask for beside their weights.

        Those of local specs, and those that Transformer Engine's layers have besides.
        """
        yield "decoder.final_layernorm._extra_state/shard_0_1"
        for layer, mixture in enumerate(self.mixtures):
            modules = [f"self_attention.{name}" for name in ("linear_proj", "core_attention", *self._projections())]
            if self.model.mla is not None:
                modules += ["input_layernorm"]
            if self.model.qk_norm == "head":
                modules += ["self_attention.q_layernorm", "self_attention.k_layernorm"]
            if not mixture:
                modules += ["mlp.linear_fc1", "mlp.linear_fc2"]
            elif self.moe is not None:
                modules += ["pre_mlp_layernorm"]
                modules += [f"mlp.shared_experts.linear_fc{n}" for n in (1, 2) if self.moe.shared]
                for expert in range(self.moe.experts):
                    yield from (self._extra_state(f"{_EXPERTS}linear_fc{n}", layer, expert) for n in (1, 2))
            yield from (self._extra_state(module, layer, None) for module in modules)

    def _projections(self) -> tuple[str, ...]:
        """Modules of attention before its core."""
        if self.model.mla is None:
            return ("linear_qkv",)
        queries = ("linear_q_proj",) if self.model.mla.q_rank is None else ("linear_q_down_proj", "linear_q_up_proj")
        return (*queries, "linear_kv_down_proj", "linear_kv_up_proj")

    def _extra_state(self, module: str, layer: int, expert: int | None) -> str:
        place = self._place(Item((), (), (), _first, _whole, layer, expert), module, self.stacked)
        offset = ".".join(map(str, place.leading)) or "0"
        return f"{place.name}._extra_state/shard_{offset}_{'.'.join(map(str, place.counts)) or '1'}"


def _first(members: list[Tensor]) -> Tensor:
    return members[0]


def _whole(item: Tensor, member: int) -> Tensor:
    return item


def _single(
    suffixes: str | tuple[str, ...], shape: tuple[int, ...], logical: str, *, part: str = "master", padded: bool = False
) -> Item:
    names = (suffixes,) if isinstance(suffixes, str) else suffixes
    return Item(names, shape, ((part, logical),), _first, _whole, padded=padded)


def _swiglu(stem: str, prefix: str, width: int, hidden: int) -> Iterator[Item]:
    """Gate over up, and down."""
    members = (("master", f"{prefix}gate"), ("master", f"{prefix}up"))
    yield Item((f"{stem}linear_fc1.weight",), (2 * hidden, width), members, torch.cat, _half)
    yield _single(f"{stem}linear_fc2.weight", (width, hidden), f"{prefix}down")


def _half(item: Tensor, member: int) -> Tensor:
    return item.chunk(2)[member]


def _qkv(kind: str, shape: tuple[int, ...], names: list[str], groups: int, queries: int) -> Item:
    """For each group of heads its queries, its key, its value."""

    def fuse(members: list[Tensor]) -> Tensor:
        return torch.cat([m.reshape(groups, -1, *shape[1:]) for m in members], dim=1).reshape(shape)

    def part(item: Tensor, member: int) -> Tensor:
        heads = item.view(groups, queries + 2, -1, *shape[1:])
        first, count = ((0, queries), (queries, 1), (queries + 1, 1))[member]
        return heads.narrow(1, first, count).reshape(-1, *shape[1:])

    return Item((f"self_attention.linear_qkv.{kind}",), shape, tuple(("master", n) for n in names), fuse, part)


def _halves(place: Place) -> list[Place]:
    """Where gate and up are kept apart; empty for what is neither."""
    if not place.name.endswith("linear_fc1.weight"):
        return []
    rows, *rest = place.extent
    return [replace(place, name=f"{place.name}_{n}", extent=(rows // 2, *rest), member=m) for m, n in enumerate("wv")]
