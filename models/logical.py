"""Every logical tensor of a model with its shape, from the configuration alone (names: see models/names.py)."""

from ..moe.config import MoEConfig
from .config import ModelConfig
from .mla_config import MLAConfig

Shapes = dict[str, tuple[int, ...]]


def logical_shapes(model: ModelConfig, moe: MoEConfig | None, vocab: int) -> Shapes:
    """Parameters of a model for a tokenizer of ``vocab`` pieces."""
    width, padded = model.width, model.padded_vocab(vocab)
    shapes: Shapes = {"embedding": (padded, width)}
    for layer in range(model.layers):
        prefix = f"layers.{layer}."
        shapes |= {f"{prefix}attention_norm": (width,), f"{prefix}ffn_norm": (width,)}
        shapes |= _attention(model, f"{prefix}attention.")
        if moe is not None and moe.is_mixture(layer):
            shapes |= _mixture(model, moe, f"{prefix}moe.")
        else:
            shapes |= _swiglu(f"{prefix}ffn.", width, model.ffn)
    shapes["final_norm"] = (width,)
    if not model.tied:
        shapes["head"] = (padded, width)
    return shapes


def buffer_shapes(model: ModelConfig, moe: MoEConfig | None) -> Shapes:
    """What its layers carry from step to step besides parameters."""
    if moe is None:
        return {}
    kinds = [*(["bias"] if moe.bias_rate else []), *(["load"] if moe.balance == "global" else [])]
    mixtures = [layer for layer in range(model.layers) if moe.is_mixture(layer)]
    return {f"layers.{layer}.moe.{kind}": (moe.experts,) for layer in mixtures for kind in kinds}


def _attention(model: ModelConfig, prefix: str) -> Shapes:
    if model.mla is not None:
        return {prefix + name: shape for name, shape in _latent(model, model.mla).items()}
    queries, keys = model.heads * model.head_dim, model.kv_heads * model.head_dim
    rows = {"q": queries, "k": keys, "v": keys}
    shapes: Shapes = {prefix + name: (count, model.width) for name, count in rows.items()}
    shapes[f"{prefix}o"] = (model.width, queries)
    if model.qkv_bias:
        shapes |= {f"{prefix}{name}_bias": (count,) for name, count in rows.items()}
    if model.qk_norm == "head":
        shapes |= {f"{prefix}q_norm": (model.head_dim,), f"{prefix}k_norm": (model.head_dim,)}
    elif model.qk_norm == "full":
        shapes |= {
            f"{prefix}q_norm": (model.heads, model.head_dim),
            f"{prefix}k_norm": (model.kv_heads, model.head_dim),
        }
    return shapes


def _latent(model: ModelConfig, mla: MLAConfig) -> Shapes:
    queries = model.heads * mla.head_dim
    made: Shapes = {"q": (queries, model.width)}
    if mla.q_rank is not None:
        made = {"q_down": (mla.q_rank, model.width), "q_norm": (mla.q_rank,), "q_up": (queries, mla.q_rank)}
    return made | {
        "kv_down": (mla.kv_rank + mla.rope_dim, model.width),
        "kv_norm": (mla.kv_rank,),
        "kv_up": (model.heads * (mla.nope_dim + mla.value_dim), mla.kv_rank),
        "o": (model.width, model.heads * mla.value_dim),
    }


def _mixture(model: ModelConfig, moe: MoEConfig, prefix: str) -> Shapes:
    width, hidden = model.width, moe.width_of_expert(model.width)
    shapes: Shapes = {f"{prefix}router": (moe.experts, width)} if moe.scored else {}
    for expert in range(moe.experts):
        shapes |= _swiglu(f"{prefix}experts.{expert}.", width, hidden)
    if moe.shared:
        shapes |= _swiglu(f"{prefix}shared.", width, moe.shared * hidden)
    return shapes


def _swiglu(prefix: str, width: int, hidden: int) -> Shapes:
    return {f"{prefix}gate": (hidden, width), f"{prefix}up": (hidden, width), f"{prefix}down": (width, hidden)}
