"""Ours as one layer of ``bench moe``, and what makes a peer one: the same weights, the same input, its own code."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..moe.config import MoEConfig
from ..moe.layer import MoELayer
from .device import DEVICE
from .fastest import fastest
from .floor import DTYPES
from .layer_cases import LayerCase

WARM_UP = 5  # steps


@dataclass(frozen=True)
class Layer:
    """A mixture layer, whoever wrote it.

    Attributes:
        forward: hidden states ``[S, B, D]`` to (the same, the router's losses if it returns any).
        weights: its parameters by the name that ours have; several where it keeps apart what ours has in one, in the
            order in which ours has them.
        options: names of ways to compute the same.
        choose: takes one of them.
    """

    module: nn.Module
    forward: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    weights: Mapping[str, Sequence[nn.Parameter]]
    note: str
    options: tuple[str, ...] = ()
    choose: Callable[[str], None] = lambda option: None

    @torch.no_grad()
    def load(self, source: "Layer") -> None:
        """Take the weights of another."""
        for name, parts in self.weights.items():
            whole = torch.cat([part.flatten() for part in source.weights[name]])
            for part, values in zip(parts, whole.split([part.numel() for part in parts]), strict=True):
                part.copy_(values.view_as(part))

    def gradients(self) -> dict[str, Tensor]:
        """Gradients by the name of our parameter, flat."""
        return {name: torch.cat([_gradient(part).flatten() for part in parts]) for name, parts in self.weights.items()}

    def step(self, x_SBD: Tensor, grad_SBD: Tensor) -> Tensor:
        """Forward and backward, gradients anew; returns the hidden states."""
        self.module.zero_grad(set_to_none=True)
        x_SBD.grad = None
        hidden, loss = self.forward(x_SBD)
        if loss is None:
            hidden.backward(grad_SBD)
        else:
            torch.autograd.backward([hidden, loss], [grad_SBD, None])
        return hidden


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def our_layer(width: int, config: MoEConfig, dtype: str) -> Layer:
    """`MoELayer`, every matrix drawn with standard deviation 1 / sqrt(fan-in)."""
    module = MoELayer(width, config)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=1 / math.sqrt(parameter.shape[-1]), generator=draw)
    module.to(DTYPES[dtype])

    def forward(x_SBD: Tensor) -> tuple[Tensor, Tensor | None]:
        output = module(x_SBD)
        module.take_statistics()  # as the training loop does each step
        return output.hidden, output.loss if output.loss.requires_grad else None  # a forced router has none

    note = "with both losses" if config.scored else "random experts, the drawing included; no losses"
    return Layer(module, forward, {name: [weight] for name, weight in module.named_parameters()}, note)


class LayerStep:
    """A `Stepper`: forward and backward of one layer, no optimizer."""

    bytes_moved = None

    def __init__(self, case: LayerCase, layer: Layer, leave: Callable[[], None] = lambda: None):
        self.layer = layer
        layer.module.to(DEVICE).train()
        self._leave = leave
        shape = (case.seq, case.batch, case.width)
        draw = torch.Generator().manual_seed(1)
        self.x, self.grad = (torch.randn(shape, generator=draw).to(DEVICE, DTYPES[case.dtype]) for _ in range(2))
        self.x.requires_grad_()

    def warm_up(self) -> str:
        notes = [self.layer.note]
        if self.layer.options:
            best, tried = fastest(self.layer.options, self._try)
            self.layer.choose(best)
            notes.append(f"experts {best} ({tried})")
        for _ in range(WARM_UP):
            self.step()
        return "; ".join(notes)

    def _try(self, option: str) -> None:
        self.layer.choose(option)
        self.step()

    def step(self) -> None:
        self.layer.step(self.x, self.grad)

    def close(self) -> None:
        self._leave()


def ours(case: Mapping[str, Any], routing: str) -> LayerStep:
    """Factory of our layer; ``routing`` as in `LayerCase.moe`."""
    shape = LayerCase(**case)
    return LayerStep(shape, our_layer(shape.width, shape.moe(routing), shape.dtype))
