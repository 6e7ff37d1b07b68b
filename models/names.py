"""Logical names: every parameter of the model by what it is, whatever layout holds which part of it where.

A local parameter (fused, sharded) is a list of `Piece`s; each piece is a box of one logical tensor. Initialisation
and checkpoints speak of logical tensors only. The logical tensors of a model with L layers, D width, V padded
vocabulary, H heads of width d, F feed-forward width, E experts:

    embedding [V, D]   head [V, D] (untied)   final_norm [D]
    layers.i.attention_norm [D]   layers.i.ffn_norm [D]
    layers.i.attention.q [H d, D]   .k [Hkv d, D]   .v [Hkv d, D]   .o [D, H d]   .q_norm   .k_norm
    layers.i.attention.q_bias [H d]   .k_bias [Hkv d]   .v_bias [Hkv d]
    layers.i.ffn.gate [F, D]   .up [F, D]   .down [D, F]
    layers.i.moe.router [E, D]   layers.i.moe.experts.j.gate|up|down   layers.i.moe.shared.gate|up|down

Latent attention (latents of Rq and R features; per head n without position, r rotating, v of its value) has instead

    layers.i.attention.q_down [Rq, D]   .q_norm [Rq]   .q_up [H (n + r), Rq]   or .q [H (n + r), D]
    layers.i.attention.kv_down [R + r, D]: the latent's rows, then the shared key's   .kv_norm [R]
    layers.i.attention.kv_up [H (n + v), R]: for each head its key's rows, then its value's   .o [D, H v]

What a mixture carries from step to step besides its parameters (moe/balance.py):

    layers.i.moe.bias [E]   layers.i.moe.load [E]
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from ..moe.config import MoEConfig
from ..parallel.groups import Groups
from ..parallel.roles import Role
from .config import ModelConfig


@dataclass(frozen=True)
class Piece:
    """A box of a logical tensor and where it lies in a local one.

    Attributes:
        name: logical name.
        shape: shape of the whole logical tensor.
        start: first index of the box in each dimension.
        extent: shape of the box.
        view: picks the part out of any tensor of the local parameter's shape, without copying.
    """

    name: str
    shape: tuple[int, ...]
    start: tuple[int, ...]
    extent: tuple[int, ...]
    view: Callable[[Tensor], Tensor]

    def read(self, local: Tensor) -> Tensor:
        """The box, in its logical shape."""
        return self.view(local).reshape(self.extent)

    def write(self, local: Tensor, box: Tensor) -> None:
        """Store ``box`` into the local tensor."""
        part = self.view(local)
        part.copy_(box.reshape(part.shape))

    def of(self, whole: Tensor) -> Tensor:
        """The box of a whole logical tensor."""
        for dimension, (start, extent) in enumerate(zip(self.start, self.extent, strict=True)):
            whole = whole.narrow(dimension, start, extent)
        return whole


@dataclass(frozen=True)
class Entry:
    """A local parameter: its pieces and its role in the layout."""

    parameter: nn.Parameter
    pieces: tuple[Piece, ...]
    role: Role


@dataclass(frozen=True)
class Buffer:
    """What a layer carries from step to step besides parameters: whole, and alike on every rank with that layer."""

    values: Tensor
    piece: Piece


def _whole(name: str, local: Tensor) -> tuple[Piece, ...]:
    shape = tuple(local.shape)
    return (Piece(name, shape, (0,) * len(shape), shape, lambda t: t),)


def _split(name: str, local: Tensor, dimension: int, rank: int, ranks: int) -> tuple[Piece, ...]:
    """An equal share of a logical tensor that is cut along one dimension."""
    extent = tuple(local.shape)
    shape = tuple(n * ranks if d == dimension else n for d, n in enumerate(extent))
    start = tuple(n * rank if d == dimension else 0 for d, n in enumerate(extent))
    return (Piece(name, shape, start, extent, lambda t: t),)


def _latent_name(parameter: str) -> str:
    """``q_down`` of ``self_attention.linear_q_down_proj.weight``."""
    return parameter.split(".")[1].removeprefix("linear_").removesuffix("_proj")


class NameMap:
    """Maps this rank's parameters to logical tensors and roles."""

    def __init__(self, model: ModelConfig, moe: MoEConfig | None, groups: Groups):
        self.model = model
        self.moe = moe
        self.groups = groups
        topology = groups.topology
        self.tensor_rank, self.tensor = topology.tensor_rank(groups.rank), topology.tensor

    def entries(self, stage: nn.ModuleList) -> dict[str, Entry]:
        """Entry of every local parameter, by its name in the rank's part of the model.

        Raises:
            KeyError: a parameter that the map does not know; nothing is ever left out silently.
        """
        return {name: self._entry(name, parameter) for name, parameter in stage.named_parameters()}

    def buffers(self, stage: nn.ModuleList) -> list[Buffer]:
        """Every persistent buffer of this rank's layers.

        Raises:
            KeyError: a buffer that the map does not know.
        """
        parameters = dict(stage.named_parameters(remove_duplicate=False))
        state = {name: value for name, value in stage.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
        return [
            Buffer(values, *_whole(self._buffer_name(name), values))
            for name, values in state.items()
            if name not in parameters
        ]

    def _buffer_name(self, name: str) -> str:
        prefix, rest = self._in_layer(name)
        match rest:
            case "mlp.balance.bias_E":
                return prefix + "moe.bias"
            case "mlp.balance.load_E":
                return prefix + "moe.load"
        raise KeyError(f"no logical name for the buffer {name}")

    def _in_layer(self, name: str) -> tuple[str, str]:
        """(logical prefix of the layer, the rest of the module's own name); outside all layers the prefix is empty."""
        chunk, rest = name.split(".", 1)
        if not rest.startswith("decoder.layers."):
            return "", rest
        _, _, local_layer, rest = rest.split(".", 3)
        layers = self.groups.topology.layers(self.groups.rank, int(chunk), self.model.layers)
        return f"layers.{layers[int(local_layer)]}.", rest

    def _entry(self, name: str, parameter: nn.Parameter) -> Entry:
        prefix, rest = self._in_layer(name)
        pieces, role = self._layer_entry(prefix, rest, parameter) if prefix else self._outer_entry(rest, parameter)
        return Entry(parameter, pieces, role)

    def _outer_entry(self, name: str, p: nn.Parameter) -> tuple[tuple[Piece, ...], Role]:
        if name == "embedding.word_embeddings.weight":
            return _split("embedding", p, 0, self.tensor_rank, self.tensor), Role(tensor_sharded=self.tensor > 1)
        if name == "output_layer.weight":
            logical = "embedding" if self.model.tied else "head"
            role = Role(tensor_sharded=self.tensor > 1, tied_copy=self.model.tied)
            return _split(logical, p, 0, self.tensor_rank, self.tensor), role
        if name == "decoder.final_layernorm.weight":
            return _whole("final_norm", p), self._norm_role()
        raise KeyError(f"no logical name for the parameter {name}")

    def _norm_role(self) -> Role:
        return Role(decay=False, tensor_summed=self.groups.topology.sequence)

    def _layer_entry(self, prefix: str, rest: str, p: nn.Parameter) -> tuple[tuple[Piece, ...], Role]:
        sharded = Role(tensor_sharded=self.tensor > 1)
        topology = self.groups.topology
        summed = Role(tensor_summed=topology.sequence)
        expert = Role(expert=True, tensor_summed=topology.sequence and topology.experts_on_all_tensor_ranks)
        rank, ranks = self.tensor_rank, self.tensor
        match rest:
            case "input_layernorm.weight":
                return _whole(prefix + "attention_norm", p), self._norm_role()
            case "pre_mlp_layernorm.weight":
                return _whole(prefix + "ffn_norm", p), self._norm_role()
            case "self_attention.linear_qkv.weight":
                return self._qkv(prefix + "attention.", "", (self.model.width,)), sharded
            case "self_attention.linear_qkv.bias":
                return self._qkv(prefix + "attention.", "_bias", ()), Role(decay=False, tensor_sharded=ranks > 1)
            case "self_attention.linear_proj.weight":
                return _split(prefix + "attention.o", p, 1, rank, ranks), sharded
            case "self_attention.q_layernorm.weight" | "self_attention.k_layernorm.weight":
                logical = f"{prefix}attention.{rest.split('.')[1][0]}_norm"
                if self.model.mla is not None:
                    return _whole(logical, p), self._norm_role()
                if self.model.qk_norm == "head":
                    # Each tensor rank has other heads.
                    return _whole(logical, p), Role(decay=False, tensor_summed=ranks > 1)
                return _split(logical, p, 0, rank, ranks), Role(decay=False, tensor_sharded=ranks > 1)
            case "self_attention.linear_q_proj.weight":
                return _split(prefix + "attention.q", p, 0, rank, ranks), sharded
            case "self_attention.linear_q_down_proj.weight" | "self_attention.linear_kv_down_proj.weight":
                return _whole(prefix + "attention." + _latent_name(rest), p), summed
            case "self_attention.linear_q_up_proj.weight" | "self_attention.linear_kv_up_proj.weight":
                return _split(prefix + "attention." + _latent_name(rest), p, 0, rank, ranks), sharded
            case "self_attention.kv_layernorm.weight":
                return _whole(prefix + "attention.kv_norm", p), self._norm_role()
            case "mlp.linear_fc1.weight":
                return self._gate_up(prefix + "ffn.", self.model.ffn, rank, ranks), sharded
            case "mlp.linear_fc2.weight":
                return _split(prefix + "ffn.down", p, 1, rank, ranks), sharded
            case "mlp.router.weight":
                return _whole(prefix + "moe.router", p), summed
            case "mlp.shared.w_in":
                return self._gate_up(prefix + "moe.shared.", p.shape[0] // 2, 0, 1), summed
            case "mlp.shared.w_out":
                return _whole(prefix + "moe.shared.down", p), summed
            case "mlp.experts.w_in":
                return self._experts(prefix, p, ("gate", "up")), expert
            case "mlp.experts.w_out":
                return self._experts(prefix, p, ("down",)), expert
        raise KeyError(f"no logical name for the parameter {prefix}{rest}")

    def _qkv(self, prefix: str, suffix: str, columns: tuple[int, ...]) -> tuple[Piece, ...]:
        """Megatron stores, for each group of heads in turn, its queries, then its key, then its value."""
        model, rank = self.model, self.tensor_rank
        groups, queries = model.kv_heads // self.tensor, model.heads // model.kv_heads
        d, zeros = model.head_dim, (0,) * len(columns)

        def part(first: int, count: int) -> Callable[[Tensor], Tensor]:
            return lambda t: t.view(groups, queries + 2, d, *columns).narrow(1, first, count)

        def piece(name: str, first: int, count: int) -> Piece:
            rows = groups * count * d
            view = part(first, count)
            whole, start, extent = (rows * self.tensor, *columns), (rows * rank, *zeros), (rows, *columns)
            return Piece(prefix + name + suffix, whole, start, extent, view)

        return piece("q", 0, queries), piece("k", queries, 1), piece("v", queries + 1, 1)

    def _gate_up(self, prefix: str, hidden: int, rank: int, ranks: int) -> tuple[Piece, ...]:
        """Gate rows over up rows, each cut over tensor ranks."""
        share, width = hidden // ranks, self.model.width

        def piece(name: str, first: int) -> Piece:
            return Piece(
                prefix + name, (hidden, width), (share * rank, 0), (share, width), lambda t: t.narrow(0, first, share)
            )

        return piece("gate", 0), piece("up", share)

    def _experts(self, prefix: str, p: nn.Parameter, parts: tuple[str, ...]) -> tuple[Piece, ...]:
        """Whole logical tensors of each local expert."""
        local, rows, columns = p.shape[0], p.shape[1] // len(parts), p.shape[2]
        first = local * self.groups.topology.expert_rank(self.groups.rank)

        def piece(expert: int, part: int) -> Piece:
            name = f"{prefix}moe.experts.{first + expert}.{parts[part]}"
            return Piece(
                name, (rows, columns), (0, 0), (rows, columns), lambda t: t[expert].narrow(0, part * rows, rows)
            )

        return tuple(piece(expert, part) for expert in range(local) for part in range(len(parts)))
