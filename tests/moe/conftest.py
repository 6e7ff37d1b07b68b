"""Filled mixture layers."""

from collections.abc import Callable

import pytest
import torch

from moescale.moe import MoEConfig, MoELayer


def filled_layer(width: int, config: MoEConfig, seed: int = 0, *, batch_first: bool = False) -> MoELayer:
    """A layer whose matrices have standard deviation 1 / sqrt(fan-in), the router's 2 / sqrt(width)."""
    layer = MoELayer(width, config, batch_first=batch_first)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            scale = (2 if name.startswith("router") else 1) / parameter.shape[-1] ** 0.5
            parameter.copy_(scale * torch.randn(parameter.shape, generator=draw))
    return layer


@pytest.fixture(scope="session")
def make_layer() -> Callable[..., MoELayer]:
    return filled_layer
