"""The layer against those of Megatron-core, DeepSpeed and transformers, given the same weights.

Outputs and the gradients of input, router, experts and shared experts agree to 1e-5 of each tensor's maximum.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moescale.benchmarks.layer_peers import deepspeed_layer, megatron_layer, olmoe_layer
from moescale.benchmarks.layers import Layer, our_layer
from moescale.moe import MoEConfig
from moescale.moe.capacity import capacity_of
from moescale.moe.routing import TokenGrid
from moescale.moe.statistics import summarise

WIDTH, EXPERTS, ACTIVE, HIDDEN = 32, 8, 4, 24
SEQ, BATCH = 20, 3
BOUND = 1e-5  # of a tensor's maximum
MARGIN = 1e-6  # by which what is selected beats what is not: ten times float32's rounding


def mixture(**keys: Any) -> MoEConfig:
    """Without losses of the router, unless ``keys`` ask for them."""
    quiet = {"balance": "none", "z_loss": 0.0}
    return MoEConfig.model_validate({"experts": EXPERTS, "active": ACTIVE, "expert_width": HIDDEN, **quiet, **keys})


def inputs(seed: int = 1) -> tuple[Tensor, Tensor]:
    """Hidden states ``[S, B, D]`` and a gradient of the layer's output that has nothing to do with it."""
    draw = torch.Generator().manual_seed(seed)
    x_SBD, grad_SBD = (torch.randn(SEQ, BATCH, WIDTH, generator=draw) for _ in range(2))
    return x_SBD, grad_SBD


def assert_margin(scores_NX: Tensor, chosen: int) -> None:
    """In no row does the selection of the ``chosen`` largest hang on rounding."""
    ordered_NX = scores_NX.sort(dim=-1, descending=True).values
    assert (ordered_NX[:, chosen - 1] - ordered_NX[:, chosen]).min() > MARGIN


def assert_margins(ours: Layer, config: MoEConfig, x_SBD: Tensor) -> None:
    """Of the groups and experts of every token, and of the tokens that an expert has capacity for."""
    layer: Any = ours.module
    x_TD = x_SBD.flatten(0, 1)
    sigmoid = config.score.startswith("sigmoid")
    logits_TE = (x_TD @ layer.router.weight.T).detach()
    scores_TE = logits_TE.sigmoid() if sigmoid else logits_TE.softmax(dim=-1)
    if layer.balance.bias_E is not None:
        scores_TE = scores_TE + layer.balance.bias_E
    if config.groups > 1:
        grouped_TGe = scores_TE.view(len(scores_TE), config.groups, -1)
        best_TG = grouped_TGe.topk(2 if sigmoid else 1, dim=-1).values.sum(dim=-1)
        assert_margin(best_TG, config.groups_active)
        kept_TG = torch.zeros_like(best_TG).scatter(1, best_TG.topk(config.groups_active).indices, 1.0)
        scores_TE = torch.where(kept_TG.unsqueeze(-1) > 0, grouped_TGe, -1.0).flatten(1)
    assert_margin(scores_TE, config.active)
    if config.capacity is not None:
        routing = layer.router(x_TD, TokenGrid(BATCH), None, bias_E=layer.balance.bias_E)
        weights_TE = torch.zeros_like(scores_TE).scatter(1, routing.index_TK, routing.weight_TK.detach())
        capacity = capacity_of(config, len(x_TD))
        full_E = (weights_TE > 0).sum(dim=0) > capacity
        if full_E.any():
            assert_margin(weights_TE.T[full_E], capacity)


def assert_same(ours: Layer, theirs: Layer, config: MoEConfig) -> None:
    x_SBD, grad_SBD = inputs()
    assert_margins(ours, config, x_SBD)
    found = []
    for layer in (ours, theirs):
        x = x_SBD.clone().requires_grad_()
        hidden = layer.step(x, grad_SBD)
        assert x.grad is not None
        found.append({"output": hidden, "input": x.grad, **layer.gradients()})
    mine, other = found
    assert set(mine) == set(other)
    for name, expected in other.items():
        assert expected.abs().max() > 0, name
        torch.testing.assert_close(
            mine[name], expected, rtol=0, atol=BOUND * expected.abs().max().item(), msg=lambda text, of=name: of + text
        )


def give_bias(ours: Layer, theirs: Tensor) -> None:
    """A selection bias that changes which experts are best."""
    layer: Any = ours.module
    layer.balance.bias_E.normal_(std=0.2, generator=torch.Generator().manual_seed(2))
    theirs.copy_(layer.balance.bias_E)


@pytest.mark.parametrize(
    "keys",
    [
        {"score": "softmax"},
        {"score": "softmax_normalized"},
        {"score": "softmax_normalized", "weight_scale": 2.5, "shared": 2},
        {"score": "sigmoid_normalized", "shared": 1},
        {"score": "sigmoid_normalized", "bias_rate": 0.001},
        {"score": "sigmoid_normalized", "bias_rate": 0.001, "groups": 4, "groups_active": 2, "weight_scale": 1.5},
        {"score": "softmax", "active": 2, "groups": 4, "groups_active": 2},
        {"balance": "micro_batch", "aux_loss": 0.5, "z_loss": 0.1},
        {"balance": "sequence", "aux_loss": 0.5, "z_loss": 0.1, "score": "softmax_normalized", "shared": 1},
        {"balance": "sequence", "aux_loss": 0.5, "score": "sigmoid_normalized"},
    ],
    ids=lambda keys: " ".join(f"{key}={value}" for key, value in keys.items()),
)
def test_megatron_core(keys: dict[str, Any], one_rank: object) -> None:
    config = mixture(**keys)
    ours, theirs = our_layer(WIDTH, config, "fp32"), megatron_layer(WIDTH, config, "fp32")
    theirs.load(ours)
    if config.bias_rate:
        give_bias(ours, theirs.module.router.expert_bias)  # type: ignore[union-attr, arg-type]
    assert_same(ours, theirs, config)


@pytest.mark.parametrize("score", ["softmax", "softmax_normalized", "sigmoid_normalized"])
@pytest.mark.parametrize(("capacity", "drops"), [(0.5, True), (1.0, True), (2.0, False)])
def test_megatron_core_drops_the_same_visits(score: str, capacity: float, drops: bool, one_rank: object) -> None:
    """Its capacity is that of a micro-batch. Its other rule, ``position``, keeps any visits on a CPU: it takes the
    top of many ones, and torch does not say which of equal values that is."""
    config = mixture(score=score, capacity=capacity, drop="probability", capacity_scope="micro_batch")
    ours, theirs = our_layer(WIDTH, config, "fp32"), megatron_layer(WIDTH, config, "fp32")
    theirs.load(ours)
    layer: Any = ours.module
    layer(inputs()[0])
    assert (summarise(0, layer.take_statistics())["dropped"] > 0) == drops
    assert_same(ours, theirs, config)


@pytest.mark.parametrize(
    "keys",
    [{"active": 2}, {"active": 4}, {"active": 4, "balance": "micro_batch", "aux_loss": 0.5}],
    ids=["K=2", "K=4", "K=4, load-balance loss"],
)
def test_deepspeed(keys: dict[str, Any], one_rank: object) -> None:
    config = mixture(score="softmax_normalized", **keys)
    ours, theirs = our_layer(WIDTH, config, "fp32"), deepspeed_layer(WIDTH, config, "fp32")
    theirs.load(ours)
    assert_same(ours, theirs, config)


@pytest.mark.parametrize(
    ("peer", "config"),
    [
        (megatron_layer, mixture(score="sigmoid")),
        (megatron_layer, mixture(balance="global")),
        (megatron_layer, mixture(router="hash")),
        (deepspeed_layer, mixture(score="softmax")),
        (deepspeed_layer, mixture(score="softmax_normalized", shared=1)),
        (olmoe_layer, mixture(score="sigmoid_normalized")),
    ],
)
def test_peers_refuse_what_they_do_not_have(
    peer: Callable[[int, MoEConfig, str], Layer], config: MoEConfig, one_rank: object
) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match=r"has no|DeepSpeed's MoE|OLMoE's block"):
        peer(WIDTH, config, "fp32")


def hugging_face(block: Any, **shared: Any) -> Layer:
    """A block of transformers whose experts are fused as ours are."""
    weights = {
        "router.weight": [block.gate.weight],
        "experts.w_in": [block.experts.gate_up_proj],
        "experts.w_out": [block.experts.down_proj],
        **shared,
    }
    return Layer(block, lambda x_SBD: (block(x_SBD), None), weights, "")


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
def test_olmoe(normalized: bool, experts: str) -> None:
    pytest.importorskip("transformers")
    config = mixture(score="softmax_normalized" if normalized else "softmax")
    ours, theirs = our_layer(WIDTH, config, "fp32"), olmoe_layer(WIDTH, config, "fp32")
    theirs.load(ours)
    theirs.choose(experts)
    assert_same(ours, theirs, config)


def test_mixtral() -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    settings = transformers.MixtralConfig(
        hidden_size=WIDTH, intermediate_size=HIDDEN, num_local_experts=EXPERTS, num_experts_per_tok=ACTIVE
    )
    settings._experts_implementation = "eager"
    config = mixture(score="softmax_normalized")
    ours, theirs = our_layer(WIDTH, config, "fp32"), hugging_face(MixtralSparseMoeBlock(settings))
    theirs.load(ours)
    assert_same(ours, theirs, config)


@pytest.mark.parametrize("groups", [1, 4])
def test_glm4_moe(groups: int) -> None:
    """Sigmoid scores with a bias for the selection, groups of experts, scaled weights, shared experts."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeMoE

    active_groups = 2 if groups > 1 else 1
    settings = transformers.Glm4MoeConfig(
        hidden_size=WIDTH,
        moe_intermediate_size=HIDDEN,
        num_local_experts=EXPERTS,
        num_experts_per_tok=ACTIVE,
        n_shared_experts=2,
        n_group=groups,
        topk_group=active_groups,
        norm_topk_prob=True,
        routed_scaling_factor=1.7,
    )
    settings._experts_implementation = "eager"
    config = mixture(
        score="sigmoid_normalized",
        weight_scale=1.7,
        shared=2,
        bias_rate=0.001,
        groups=groups,
        groups_active=active_groups,
    )
    block = Glm4MoeMoE(settings)
    shared = block.shared_experts
    theirs = hugging_face(
        block,
        **{
            "shared.w_in": [shared.gate_proj.weight, shared.up_proj.weight],
            "shared.w_out": [shared.down_proj.weight],
        },
    )
    ours = our_layer(WIDTH, config, "fp32")
    theirs.load(ours)
    give_bias(ours, block.gate.e_score_correction_bias)
    assert_same(ours, theirs, config)


@pytest.mark.parametrize("model", ["olmoe", "mixtral"])
def test_load_balance_loss_of_transformers(model: str) -> None:
    """Over a micro-batch it is K times ours: theirs adds up visits where ours takes shares of them."""
    pytest.importorskip("transformers")
    if model == "olmoe":
        from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func
    else:
        from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    ours = our_layer(WIDTH, mixture(balance="micro_batch", aux_loss=1.0), "fp32")
    layer: Any = ours.module
    x_SBD, _ = inputs()
    logits_TE = (x_SBD @ layer.router.weight.T).flatten(0, 1)
    theirs = load_balancing_loss_func((logits_TE,), EXPERTS, ACTIVE)
    torch.testing.assert_close(theirs, ACTIVE * layer(x_SBD).loss)
