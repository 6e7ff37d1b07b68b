"""Counts from the configuration against what built models hold and multiply."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moescale.models.config import ModelConfig
from moescale.models.counts import count_parameters, flops_per_token, mixture_layers
from moescale.models.mla_config import MLAConfig
from moescale.models.shapes import SHAPES
from moescale.moe import MoEConfig

VOCAB, SEQ = 100, 16


def test_parameters_are_those_of_the_built_model(built: Any) -> None:
    counts = count_parameters(built.model, built.moe, VOCAB)
    sizes = {name: parameter.numel() for name, parameter in built.stage.named_parameters()}
    embedding = {name for name in sizes if "word_embeddings" in name or "output_layer" in name}
    assert len(embedding) == (1 if built.model.tied else 2)
    assert counts.all == sum(sizes.values())
    assert counts.embedding == sum(sizes[name] for name in embedding)
    assert counts.total == sum(sizes[name] for name in sizes.keys() - embedding)
    assert counts.router == sum(sizes[name] for name in sizes if "router" in name)
    routed = sum(sizes[name] for name in sizes if ".experts." in name)
    idle = routed * (built.moe.experts - built.moe.active) // built.moe.experts if built.moe else 0
    assert counts.active == counts.total - idle


def grouped_mm(a: Any, b: Any, *rest: Any, out_shape: Any = None, **unused: Any) -> int:
    """[R, K] x [E, K, N], and the weights' gradient [M, R] x [R, N]: every row meets one matrix only."""
    return 2 * a[0] * a[1] * b[-1]


def attention(q: Any, k: Any, v: Any, *rest: Any, **unused: Any) -> int:
    """q k^T and p v, over the full square."""
    batch, heads, length, width = q
    return 2 * 2 * batch * heads * length * length * width


def attention_backward(gradient: Any, q: Any, k: Any, v: Any, *rest: Any, **unused: Any) -> int:
    """Two products for each of the forward pass's; the kernel's recomputation of the scores is not the model's."""
    return 2 * attention(q, k, v)


def weighted_sum(*shapes: Any, **unused: Any) -> int:
    """The K-term sum of a token's experts runs as a bmm, but is no product of matrices."""
    return 0


aten = torch.ops.aten
FORMULAS = {
    aten._grouped_mm: grouped_mm,
    aten._scaled_dot_product_flash_attention_for_cpu: attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
    aten.bmm: weighted_sum,
}


def counted(work: Callable[[], Any]) -> tuple[int, Any]:
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        result = work()
    return counter.get_total_flops(), result


def zeros_multiplied(model: ModelConfig) -> int:
    """FLOPs a token of the zeros that make keys and values equally wide for torch's kernel on CPU."""
    if model.mla is None:
        return 0
    return 2 * SEQ * model.layers * model.heads * abs(model.head_dim - model.mla.value_dim)


def test_flops_are_those_of_the_built_model(built: Any, make_batch: Callable[..., Any]) -> None:
    tokens, labels = make_batch(batches=2, seq=SEQ)
    flops = flops_per_token(built.model, built.moe, VOCAB, SEQ)
    wanted = (flops.forward + zeros_multiplied(built.model)) * tokens.numel()
    forward, losses = counted(lambda: built.losses(tokens, labels))
    assert forward == wanted
    backward, _ = counted(lambda: losses.square().mean().backward())
    assert backward == 2 * wanted
    assert flops.total == 3 * flops.forward


def test_every_part_of_the_flops() -> None:
    model = ModelConfig(layers=3, width=32, heads=4, kv_heads=2, ffn=96, vocab_multiple=64)
    moe = MoEConfig(experts=8, active=2, expert_width=16, shared=1, first_dense=1)
    flops = flops_per_token(model, moe, VOCAB, SEQ)
    assert flops.attention == 3 * (2 * (32 * 32 * 2 + 32 * 16 * 2) + 4 * SEQ * 32)
    assert flops.feed_forward == 2 * 3 * 32 * 96 + 2 * 2 * 3 * 32 * 16 * (2 + 1)
    assert flops.router == 2 * 2 * 32 * 8
    assert flops.head == 2 * 32 * 128
    assert flops.six_n == 6 * count_parameters(model, moe, VOCAB).active


def test_every_part_of_latent_attention() -> None:
    mla = MLAConfig(q_rank=8, kv_rank=16, nope_dim=6, rope_dim=2, value_dim=10)
    flops = flops_per_token(ModelConfig(layers=3, width=32, heads=4, mla=mla), None, VOCAB, SEQ)
    down, up, output = 32 * 8 + 32 * (16 + 2), 8 * 4 * 8 + 16 * 4 * (6 + 10), 4 * 10 * 32
    assert flops.attention == 3 * 2 * (down + up + output + SEQ * 4 * (8 + 10))


def test_deepseek_v3_is_as_large_as_its_report_says() -> None:
    """2412.19437, abstract and section 4.2: 671 B parameters, 37 B of them for each token."""
    model = ModelConfig(
        layers=61,
        width=7168,
        heads=128,
        ffn=18_432,
        tied=False,
        vocab_multiple=1,
        mla=MLAConfig(q_rank=1536, kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128),
    )
    moe = MoEConfig(experts=256, active=8, expert_width=2048, shared=1, first_dense=3)
    counts = count_parameters(model, moe, 129_280)
    assert round(counts.all / 1e9) == 671
    assert int((counts.active + counts.embedding) / 1e9) == 37


def test_six_n_is_near_the_exact_count_where_sequences_are_short() -> None:
    """6 N leaves out scores and head; in a large model at a short sequence they are little."""
    flops = flops_per_token(ModelConfig(shape="70B"), None, 32_000, 512)
    assert 1.0 < flops.total / flops.six_n < 1.05


def test_total_does_not_depend_on_experts_visited_nor_active_on_experts_held() -> None:
    model = ModelConfig(shape="d64")

    def count(experts: int, active: int) -> Any:
        return count_parameters(model, MoEConfig(experts=experts, active=active, granularity=4), VOCAB)

    assert count(16, 1).total == count(16, 8).total
    routers = 3 * 64 * (32 - 16)
    assert count(32, 4).active - count(16, 4).active == routers
    one = 3 * 3 * 64 * 64
    assert count(16, 5).active - count(16, 4).active == one


def test_full_granularity_one_costs_what_dense_costs() -> None:
    """One visit to an expert of G = 1 is a dense layer, but for the router."""
    model = ModelConfig(shape="d64")
    dense = count_parameters(model, None, VOCAB)
    mixture = count_parameters(model, MoEConfig(experts=8, active=1, granularity=1), VOCAB)
    assert mixture.active == dense.active + mixture.router
    assert mixture_layers(model, None) == []


@pytest.mark.parametrize("name", SHAPES)
def test_every_rung_is_what_its_name_says(name: str) -> None:
    """Small rungs are named by width. The others follow GPT-3's shapes and are named like them: SwiGLU's third
    matrix adds up to a quarter to the name, grouped keys take some away."""
    model = ModelConfig(shape=name)
    if name.startswith("d"):
        assert model.width == int(name[1:])
        return
    number, unit = re.fullmatch(r"([\d.]+)([MB])", name).groups()  # type: ignore[union-attr]
    nominal = float(number) * {"M": 1e6, "B": 1e9}[unit]
    assert 0.9 < count_parameters(model, None, 32_000).total / nominal < 1.26


def test_the_ladder_climbs_from_thousands_to_beyond_a_hundred_billion() -> None:
    sizes = [count_parameters(ModelConfig(shape=name), None, 1024).total for name in SHAPES]
    assert sizes == sorted(sizes)
    assert sizes[0] < 5e4
    assert sizes[-1] > 1e11
    assert all(b / a < 5 for a, b in zip(sizes, sizes[1:], strict=False)), "no rung is further than five times the last"
