"""The layer on a GPU against itself on the CPU, in float32 and bfloat16; and that it never waits for the device."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from moescale.moe import MoEConfig, MoELayer, ops

Make = Callable[..., MoELayer]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(ops.implementation("route", "CUDA") != "native", reason="csrc/ was built without CUDA"),
]

S, B, D = 64, 4, 64
CONFIGS = {
    "plain": MoEConfig(experts=8, active=2, expert_width=32),
    "fine, normalized, shared": MoEConfig(experts=64, active=8, granularity=8, score="softmax_normalized", shared=2),
    "sigmoid with biases": MoEConfig(experts=16, active=4, expert_width=32, score="sigmoid_normalized", bias_rate=0.01),
    "with drops": MoEConfig(experts=8, active=2, expert_width=32, capacity=0.5),
    "padded": MoEConfig(experts=8, active=2, expert_width=32, capacity=2.0, padded=True),
    "most tokens to few": MoEConfig(experts=256, active=1, expert_width=8),
    "groups": MoEConfig(experts=16, active=2, expert_width=32, groups=4, groups_active=2),
}


def computed(layer: MoELayer, device: str, dtype: torch.dtype, mask: Tensor | None) -> dict[str, Tensor]:
    """Output, loss and every gradient of the weighted sum of the output."""
    draw = torch.Generator().manual_seed(1)
    x, probe = (torch.randn(S, B, D, generator=draw).to(device, dtype) for _ in range(2))
    layer = layer.to(device, dtype)
    x.requires_grad_()
    output = layer(x, None if mask is None else mask.to(device))
    wanted = {"x": x, **dict(layer.named_parameters())}
    found = torch.autograd.grad((output.hidden * probe).sum() + output.loss, list(wanted.values()))
    values = {"y": output.hidden, "loss": output.loss, **dict(zip(wanted, found, strict=True))}
    return {name: value.detach().cpu().double() for name, value in values.items()}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_float32(name: str, masked: bool, make_layer: Make) -> None:
    mask = torch.rand(S, B, generator=torch.Generator().manual_seed(2)) < 0.7 if masked else None
    wanted, got = (computed(make_layer(D, CONFIGS[name]), device, torch.float32, mask) for device in ("cpu", "cuda"))
    for key, value in wanted.items():
        torch.testing.assert_close(got[key], value, rtol=0, atol=2e-5 * value.abs().max().item())


@pytest.mark.parametrize("name", CONFIGS)
def test_bfloat16(name: str, make_layer: Make) -> None:
    """Both round to bfloat16, in other places: a few of its steps apart, in the norm."""
    wanted, got = (computed(make_layer(D, CONFIGS[name]), device, torch.bfloat16, None) for device in ("cpu", "cuda"))
    for key, value in wanted.items():
        assert (got[key] - value).norm() <= 2**-6 * value.norm(), key


@contextmanager
def refusing_to_wait() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", CONFIGS)
def test_the_host_never_waits_for_the_device(name: str, make_layer: Make) -> None:
    layer = make_layer(D, CONFIGS[name]).to("cuda", torch.bfloat16)
    x = torch.randn(S, B, D, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn_like(x)

    def step() -> None:
        output = layer(x)
        torch.autograd.backward([output.hidden, output.loss], [grad, None])

    step()  # what is done once may wait
    torch.cuda.synchronize()
    with refusing_to_wait():
        step()


def test_no_token_at_all(make_layer: Make) -> None:
    layer = make_layer(D, CONFIGS["plain"]).to("cuda", torch.bfloat16)
    x = torch.zeros(0, B, D, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    output = layer(x)
    (output.hidden.sum() + output.loss.nan_to_num()).backward()
    assert output.hidden.shape == x.shape
    for parameter in layer.experts.parameters():
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))
