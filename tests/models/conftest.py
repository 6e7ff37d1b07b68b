"""Built models with known parameters, and the configurations that the tests of this folder share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moescale.models.config import ModelConfig
from moescale.models.mla_config import MLAConfig, YarnConfig
from moescale.moe import MoEConfig

VOCAB = 100  # padded to 128

CASES: dict[str, tuple[ModelConfig, MoEConfig | None]] = {
    "dense": (ModelConfig(layers=2, width=32, heads=4), None),
    "dense, untied, grouped": (ModelConfig(layers=2, width=32, heads=4, kv_heads=2, tied=False, ffn=40), None),
    "dense, one key head, wide heads": (ModelConfig(layers=1, width=32, heads=4, kv_heads=1, head_dim=12), None),
    "mixture": (ModelConfig(layers=2, width=32, heads=2), MoEConfig(experts=8, active=2, granularity=4)),
    "mixture, norm of each head": (
        ModelConfig(layers=3, width=32, heads=4, kv_heads=2, qk_norm="head", tied=False),
        MoEConfig(experts=4, active=1, expert_width=24, shared=2, first_dense=1),
    ),
    "mixture, norm of all heads": (
        ModelConfig(layers=4, width=32, heads=4, kv_heads=2, qk_norm="full", head_dim=16, rope_base=500),
        MoEConfig(experts=6, active=3, granularity=8, every=2, score="softmax_normalized"),
    ),
    "dense, biases, half of each head turns": (
        ModelConfig(
            layers=2,
            width=32,
            heads=4,
            kv_heads=2,
            head_dim=12,
            qkv_bias=True,
            rotary_fraction=0.5,
            qk_norm="head",
            norm_eps=1e-2,
            rope_base=123.5,
        ),
        None,
    ),
    "mixture, biases, another epsilon": (
        ModelConfig(layers=2, width=32, heads=4, qkv_bias=True, qk_norm="full", norm_eps=1e-1),
        MoEConfig(experts=4, active=2, granularity=8),
    ),
    "latent attention": (
        ModelConfig(
            layers=2, width=32, heads=3, mla=MLAConfig(kv_rank=12, nope_dim=6, rope_dim=4, value_dim=7), rope_base=500
        ),
        None,
    ),
    "latent queries, wide values": (
        ModelConfig(
            layers=1,
            width=24,
            heads=2,
            tied=False,
            norm_eps=1e-3,
            mla=MLAConfig(q_rank=10, kv_rank=5, nope_dim=2, rope_dim=6, value_dim=11, norm_eps=1e-2),
        ),
        None,
    ),
    "mixture, latent attention, stretched positions": (
        ModelConfig(
            layers=2,
            width=32,
            heads=4,
            mla=MLAConfig(q_rank=24, kv_rank=16, nope_dim=8, rope_dim=16, value_dim=8),
            yarn=YarnConfig(factor=8, original_seq=10, beta_fast=2, beta_slow=0.05, mscale=0.7, mscale_all_dim=1.2),
        ),
        MoEConfig(experts=4, active=2, granularity=8, first_dense=1),
    ),
    "mixture, groups of experts": (
        ModelConfig(layers=2, width=32, heads=2),
        MoEConfig(
            experts=6, active=2, granularity=8, score="sigmoid_normalized", groups=3, groups_active=2, weight_scale=2.5
        ),
    ),
    "mixture, hashed": (
        ModelConfig(layers=2, width=32, heads=2),
        MoEConfig(experts=6, active=2, granularity=8, router="hash", shared=1),
    ),
    "mixture, experts choose": (
        ModelConfig(layers=2, width=32, heads=2),
        MoEConfig(
            experts=4, active=2, granularity=8, router="expert_choice", grouping="sequence", allow_future_leak=True
        ),
    ),
}


@dataclass
class Built:
    """A model, its name map and its parameters as logical float64 tensors."""

    stage: Any
    entries: dict[str, Any]
    model: ModelConfig
    moe: MoEConfig | None

    def tensors(self) -> dict[str, Tensor]:
        pieces = [(piece, entry.parameter) for entry in self.entries.values() for piece in entry.pieces]
        return {piece.name: piece.read(parameter).detach().double() for piece, parameter in pieces}

    def losses(self, tokens_BS: Tensor, labels_BS: Tensor, first: int = 0) -> Tensor:
        """Losses of samples ``first ...``."""
        from moescale.moe.context import RoutingContext

        for _, mixture in self.stage.mixtures():
            mixture.contexts.begin(RoutingContext(tokens_BS, torch.arange(first, first + len(tokens_BS))))
        position_BS = torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS)
        return self.stage[0](tokens_BS, position_BS, None, labels=labels_BS)


@pytest.fixture(scope="session")
def build(one_rank: Any) -> Callable[..., Built]:
    """Makes a model; every gain and matrix differs from its initial value, so that no mistake hides behind ones."""

    def make(model: ModelConfig, moe: MoEConfig | None, *, vocab: int = VOCAB, seq: int = 16, **more: Any) -> Built:
        from moescale.models.build import build_stage
        from moescale.models.initialise import initialise
        from moescale.models.names import NameMap

        stage: nn.Module = build_stage(model, moe, vocab=vocab, seq=seq, dtype="fp32", groups=one_rank, **more)
        entries = NameMap(model, moe, one_rank).entries(stage)
        initialise(entries.values(), model, seed=0)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in stage.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        return Built(stage, entries, model, moe)

    return make


@pytest.fixture(scope="session", params=CASES.values(), ids=CASES)
def built(request: pytest.FixtureRequest, build: Callable[..., Built]) -> Built:
    return build(*request.param)


def batch(batches: int = 3, seq: int = 16, vocab: int = VOCAB, seed: int = 0) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, vocab, (batches, seq + 1), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


@pytest.fixture(scope="session")
def make_batch() -> Callable[..., tuple[Tensor, Tensor]]:
    """(tokens, labels), each ``[B, S]``."""
    return batch
