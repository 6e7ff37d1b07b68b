"""The layer against the MoE blocks of Hugging Face transformers, given the same weights."""

from collections.abc import Callable

import pytest
import torch

from moescale.moe import MoEConfig, MoELayer

transformers = pytest.importorskip("transformers")

WIDTH, EXPERTS, ACTIVE, HIDDEN = 32, 8, 3, 24


def olmoe(normalized: bool) -> tuple[torch.nn.Module, Callable[..., torch.Tensor]]:
    from transformers.models.olmoe import modeling_olmoe as source

    config = transformers.OlmoeConfig(
        hidden_size=WIDTH,
        intermediate_size=HIDDEN,
        num_experts=EXPERTS,
        num_experts_per_tok=ACTIVE,
        norm_topk_prob=normalized,
    )
    config._experts_implementation = "eager"
    return source.OlmoeSparseMoeBlock(config), source.load_balancing_loss_func


def mixtral(normalized: bool) -> tuple[torch.nn.Module, Callable[..., torch.Tensor]]:
    from transformers.models.mixtral import modeling_mixtral as source

    assert normalized, "Mixtral always divides by the sum of the selected"
    config = transformers.MixtralConfig(
        hidden_size=WIDTH, intermediate_size=HIDDEN, num_local_experts=EXPERTS, num_experts_per_tok=ACTIVE
    )
    config._experts_implementation = "eager"
    return source.MixtralSparseMoeBlock(config), source.load_balancing_loss_func


@pytest.mark.parametrize(
    ("peer", "normalized"),
    [(olmoe, False), (olmoe, True), (mixtral, True)],
    ids=["OLMoE", "OLMoE normalized", "Mixtral"],
)
def test_peer_block(
    peer: Callable[[bool], tuple[torch.nn.Module, Callable[..., torch.Tensor]]],
    normalized: bool,
    make_layer: Callable[..., MoELayer],
) -> None:
    """Outputs and input gradients to 1e-5; the peer's load-balance loss of one sequence is K times ours."""
    block, balance = peer(normalized)
    config = MoEConfig(
        experts=EXPERTS,
        active=ACTIVE,
        expert_width=HIDDEN,
        score="softmax_normalized" if normalized else "softmax",
        aux_loss=1.0,
        z_loss=0.0,
    )
    layer = make_layer(WIDTH, config, batch_first=True)
    with torch.no_grad():
        block.gate.weight.copy_(layer.router.weight)
        block.experts.gate_up_proj.copy_(layer.experts.w_in)
        block.experts.down_proj.copy_(layer.experts.w_out)
    x = torch.randn(1, 50, WIDTH, generator=torch.Generator().manual_seed(1)).requires_grad_()
    ours, theirs = layer(x), block(x)
    ordered = torch.softmax(x @ layer.router.weight.T, dim=-1).sort(descending=True).values
    assert (ordered[..., ACTIVE - 1] - ordered[..., ACTIVE]).min() > 1e-5
    torch.testing.assert_close(ours.hidden, theirs, rtol=1e-5, atol=1e-5)
    mine, other = (torch.autograd.grad(y.square().sum(), x)[0] for y in (ours.hidden, theirs))
    torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5 * other.abs().max().item())
    logits = (x @ layer.router.weight.T).flatten(0, 1)
    torch.testing.assert_close(balance((logits,), EXPERTS, ACTIVE), ACTIVE * ours.loss)
