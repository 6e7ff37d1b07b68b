"""The built model against the written-out reference: losses, gradients, router losses."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from moescale.models.config import ModelConfig
from moescale.moe import MoEConfig


def assert_close(found: Tensor, expected: Tensor, name: str) -> None:
    worst = (found.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-12)
    assert worst < 1e-5, f"{name} differs by {worst:.2e} of its largest value"


def test_losses_and_every_gradient(built: Any, make_batch: Callable[..., Any], reference_gpt: ModuleType) -> None:
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1))  # a schedule that ran before may have left another
    tokens, labels = make_batch()
    tensors = {name: tensor.requires_grad_() for name, tensor in built.tensors().items()}
    expected, aux, z_sum = reference_gpt.reference_losses(tensors, built.model, built.moe, 100, tokens, labels)
    found = built.losses(tokens, labels)
    assert_close(found, expected, "the losses")
    total = expected.mean()
    if built.moe is not None:
        total = total + built.moe.aux_loss * sum(aux) + built.moe.z_loss * sum(z_sum) / tokens.numel()
    total.backward()
    built.stage.zero_grad()
    found.mean().backward()
    for entry in built.entries.values():
        for piece in entry.pieces:
            assert_close(piece.read(entry.parameter.grad), tensors[piece.name].grad, piece.name)


def test_router_losses(built: Any, make_batch: Callable[..., Any], reference_gpt: ModuleType) -> None:

    from moescale.models.counts import mixture_layers

    mixtures = built.stage.mixtures()
    assert [layer for layer, _ in mixtures] == mixture_layers(built.model, built.moe)
    tokens, labels = make_batch()
    _, aux, z_sum = reference_gpt.reference_losses(built.tensors(), built.model, built.moe, 100, tokens, labels)
    for _, mixture in mixtures:
        mixture.statistics = None
    built.losses(tokens, labels)
    for (_, mixture), layer_aux, layer_z in zip(mixtures, aux, z_sum, strict=True):
        found_aux, sequences, found_z, _, count = mixture.take_statistics()[-5:].double()
        assert (sequences, count) == (len(tokens), tokens.numel())
        assert_close(found_aux / sequences, layer_aux, "the load-balance loss")
        assert_close(found_z, layer_z, "the z-loss")


def test_padded_vocabulary_gets_no_probability(built: Any, make_batch: Callable[..., Any]) -> None:
    """Whatever the embedding's padded rows hold: the losses of all real labels are those of 100 choices."""
    tokens, _ = make_batch(batches=1, seq=4)
    with torch.no_grad():
        mass = sum(torch.exp(-built.losses(tokens, torch.full_like(tokens, label))) for label in range(100))
    torch.testing.assert_close(mass, torch.ones(1, 4), rtol=1e-5, atol=0)


def test_padded_rows_of_the_head_get_no_gradient(built: Any, make_batch: Callable[..., Any]) -> None:
    built.stage.zero_grad()
    built.losses(*make_batch()).mean().backward()
    name = "0.embedding.word_embeddings.weight" if built.model.tied else "0.output_layer.weight"
    gradient = built.entries[name].parameter.grad
    assert gradient.shape[0] == 128
    assert gradient[100:].abs().max() == 0
    assert gradient[:100].abs().amax(dim=1).min() > 0


def test_causality(built: Any, make_batch: Callable[..., Any]) -> None:
    tokens, labels = make_batch()
    later = tokens.clone()
    later[:, 9:] = (later[:, 9:] + 1) % 100
    with torch.no_grad():
        before, after = built.losses(tokens, labels), built.losses(later, labels)
    if built.moe is not None and not built.moe.causal:
        assert (before[:, :9] - after[:, :9]).abs().max() > 1e-3
    else:
        torch.testing.assert_close(before[:, :9], after[:, :9], rtol=0, atol=1e-5)
    assert (before[:, 9:] - after[:, 9:]).abs().max() > 1e-2


def test_sequences_do_not_see_each_other(built: Any, make_batch: Callable[..., Any]) -> None:
    tokens, labels = make_batch()
    with torch.no_grad():
        together = built.losses(tokens, labels)
        alone = torch.cat([built.losses(tokens[b : b + 1], labels[b : b + 1]) for b in range(len(tokens))])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"jitter": 0.3}, {"router": "hash"}], ids=str)
def test_recomputation_changes_nothing(
    options: dict[str, Any], build: Callable[..., Any], make_batch: Callable[..., Any]
) -> None:
    """Losses, gradients, and statistics, which are counted once. Two batches go forward before one goes backward."""

    model = ModelConfig(layers=2, width=32, heads=2)
    moe = MoEConfig(experts=4, active=2, granularity=4, shared=1, **options)
    found = []
    for recompute in ("none", "full"):
        made = build(model, moe, recompute=recompute)
        made.stage.train()
        losses = [made.losses(*make_batch(seed=seed), first=10 * seed) for seed in (0, 1)]
        for loss in losses:
            loss.mean().backward()
        for _, mixture in made.stage.mixtures():
            mixture.contexts.end()
        statistics = [mixture.take_statistics() for _, mixture in made.stage.mixtures()]
        found.append([*(loss.detach() for loss in losses), *statistics, *(p.grad for p in made.stage.parameters())])
    for plain, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=1e-5, atol=1e-7)


def test_an_attention_mask_is_refused() -> None:
    from moescale.models.attention import RotaryCausalAttention

    attention = RotaryCausalAttention(None, 1, None, "self", base=10_000, rotary=8)
    q = torch.zeros(2, 1, 1, 8)
    with pytest.raises(ValueError, match="attention mask cannot be given"):
        attention(q, q, q, torch.ones(2, 2, dtype=torch.bool))
