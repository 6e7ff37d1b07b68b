"""B_simple, which runs record, against the noise scale that weighs directions by the Hessian (McCandlish et al. 2018).

B_noise = tr(H Sigma) / (G^T H G) is what the optimal batch follows from; B_simple = tr(Sigma) / |G|^2 puts the identity
in H's place. The slow test trains a dense model and a mixture on Python's own text and measures both at several
losses, with Hessian-vector products through the plain-torch model:

    python -m pytest tests/training/test_hessian_noise.py -m slow -s
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from moescale.models.config import ModelConfig
from moescale.models.logical import logical_shapes
from moescale.moe.config import MoEConfig
from moescale.scaling.noise import NoiseAverage, NoiseEstimate, average

VOCAB, SEQ = 256, 32
GROUPS, SAMPLES, PROBES = 8, 48, 6  # groups of sequences; sequences in each; of these, how many probe the Hessian
BATCH = 32  # sequences of a training step; four times as many for the Hessian
LR = 3e-3


def noise_scales(
    gradient_of: Callable[[int], Tensor], hessian_times: Callable[[Tensor], Tensor], unit: float
) -> tuple[NoiseAverage, NoiseAverage]:
    """B_simple and B_noise in tokens.

    Args:
        gradient_of: the flat gradient of sample i.
        hessian_times: the Hessian of independent samples times a vector.
        unit: tokens in a sample.
    """
    simple, weighted = [], []
    for group in range(GROUPS):
        gradients = torch.stack([gradient_of(group * SAMPLES + i) for i in range(SAMPLES)])
        mean = gradients.mean(dim=0)
        centred = gradients - mean
        trace = float(centred.square().sum()) / (SAMPLES - 1)
        simple.append(NoiseEstimate(float(mean @ mean) - trace / SAMPLES, unit * trace, None))
        probes = [float(one @ hessian_times(one)) for one in centred[:PROBES]]
        curved = sum(probes) / PROBES * SAMPLES / (SAMPLES - 1)
        weighted.append(NoiseEstimate(float(mean @ hessian_times(mean)) - curved / SAMPLES, unit * curved, None))
    return average(simple), average(weighted)


def test_both_are_recovered_on_a_quadratic() -> None:
    """Loss x^T H x / 2 with known H, gradient and noise."""
    generator = torch.Generator().manual_seed(0)
    eigenvalues = torch.tensor([100.0, 10.0, 1.0, 0.1])
    gradient = torch.tensor([0.1, 0.3, 1.0, 1.0])
    deviation = torch.tensor([0.5, 1.0, 2.0, 4.0])
    draws = gradient + deviation * torch.randn((GROUPS * SAMPLES, 4), generator=generator)
    simple, weighted = noise_scales(lambda i: draws[i], lambda v: eigenvalues * v, 1.0)
    assert simple.b_simple == pytest.approx(float((deviation**2).sum() / (gradient**2).sum()), rel=0.2)
    exact = float((eigenvalues * deviation**2).sum() / (eigenvalues * gradient**2).sum())
    assert weighted.b_simple == pytest.approx(exact, rel=0.4)


class Trained:
    """A small model in plain torch, double precision, on text of the standard library."""

    def __init__(self, moe: MoEConfig | None, gpt: ModuleType) -> None:
        torch.manual_seed(0)
        self.model = ModelConfig(shape="d32", qk_norm="head")
        self.moe = moe
        self.gpt = gpt
        shapes = logical_shapes(self.model, moe, VOCAB)
        self.tensors = {
            name: (torch.ones(shape) if "norm" in name else 0.05 * torch.randn(shape)).double().requires_grad_()
            for name, shape in shapes.items()
        }
        names = ("argparse", "ast", "inspect", "typing", "subprocess", "tarfile", "zipfile", "pickle")
        text = b"".join((Path(os.__file__).parent / f"{name}.py").read_bytes() for name in names)
        pieces = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
        self.sequences = pieces[: len(pieces) // (SEQ + 1) * (SEQ + 1)].view(-1, SEQ + 1)
        self.sequences = self.sequences[torch.randperm(len(self.sequences)) % len(self.sequences)]
        self.weights = list(self.tensors.values())
        self.optimizer = torch.optim.AdamW(self.weights, lr=LR, betas=(0.9, 0.98), weight_decay=0.0)
        self.losses: list[float] = []

    def loss(self, rows: Tensor) -> Tensor:
        batch = self.sequences[rows]
        losses, *_ = self.gpt.reference_losses(self.tensors, self.model, self.moe, VOCAB, batch[:, :-1], batch[:, 1:])
        return losses.mean()

    def train(self, steps: int) -> None:
        for _ in range(steps):
            value = self.loss(torch.randint(len(self.sequences), (BATCH,)))
            self.optimizer.zero_grad()
            value.backward()
            self.optimizer.step()
            self.losses.append(float(value.detach()))

    def flat(self, value: Tensor, keep: bool = False) -> Tensor:
        parts = torch.autograd.grad(value, self.weights, create_graph=keep, allow_unused=True)
        return torch.cat(
            [(torch.zeros_like(w) if g is None else g).flatten() for g, w in zip(parts, self.weights, strict=True)]
        )

    def scales(self) -> tuple[NoiseAverage, NoiseAverage]:
        rows = torch.randperm(len(self.sequences))
        graph = self.flat(self.loss(rows[-4 * BATCH :]), keep=True)

        def hessian_times(vector: Tensor) -> Tensor:
            parts = torch.autograd.grad(graph, self.weights, vector, retain_graph=True, allow_unused=True)
            return torch.cat(
                [(torch.zeros_like(w) if g is None else g).flatten() for g, w in zip(parts, self.weights, strict=True)]
            )

        return noise_scales(lambda i: self.flat(self.loss(rows[i : i + 1])), hessian_times, SEQ)


def measured(moe: MoEConfig | None, gpt: ModuleType) -> Iterator[tuple[float, NoiseAverage, NoiseAverage]]:
    """Mean training loss and both noise scales after 60 and 300 steps."""
    trained = Trained(moe, gpt)
    for steps in (60, 240):
        trained.train(steps)
        yield sum(trained.losses[-30:]) / 30, *trained.scales()


def told(scale: NoiseAverage) -> str:
    """Tokens, with the 95 % interval where there is one."""
    value, low, high = ("?" if x is None else f"{x:.0f}" for x in (scale.b_simple, scale.low, scale.high))
    return f"{value} ({low} to {high})"


@pytest.mark.slow
@pytest.mark.timeout(1800)  # more than the default on a machine that is shared
@pytest.mark.parametrize("family", ["dense", "E4G2"])
def test_hessian_weighted_noise_of_a_real_model(
    family: str, reference_gpt: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference_gpt, "MARGIN", -1.0)  # draws between experts do not matter here
    moe = None
    if family == "E4G2":
        moe = MoEConfig(experts=8, active=2, granularity=2, score="softmax_normalized", balance="none", aux_loss=0)
    print("\nfamily, loss: B_simple, B_noise in tokens (95 %), ratio")
    ratios = []
    for loss, simple, weighted in measured(moe, reference_gpt):
        assert simple.b_simple is not None
        shown = [told(one) for one in (simple, weighted)]
        ratio = weighted.b_simple / simple.b_simple if weighted.b_simple else None
        print(f"{family}, {loss:.3f}: {shown[0]}, {shown[1]}, {ratio and round(ratio, 2)}")
        ratios += [ratio] if ratio else []
    assert ratios
    assert all(0.02 < ratio < 50 for ratio in ratios)
