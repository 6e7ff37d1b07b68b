"""Fixtures that several folders of tests share."""

import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from moescale.models.config import ModelConfig
from moescale.moe import MoEConfig

LR = 0.01
MODEL = ModelConfig(layers=2, width=32, heads=2)
MOE = MoEConfig(experts=4, active=2, expert_width=16, shared=1, first_dense=1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--parity-table", metavar="FILE", help="write what tests/training/test_parity.py measured, as Markdown"
    )


def pytest_configure(config: pytest.Config) -> None:
    if "gpu" not in config.option.markexpr:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before anybody asks CUDA for devices


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")


@pytest.fixture(scope="session")
def reference_gpt() -> ModuleType:
    """The module ``tests/reference_gpt.py``."""
    path = Path(__file__).with_name("reference_gpt.py")
    spec = importlib.util.spec_from_file_location("reference_gpt", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def one_rank() -> Iterator[object]:
    """A world of one rank: the CUDA stand-in, torch.distributed, Megatron's and DeepSpeed's groups."""
    from moescale.compat.cuda_standin import install

    install()
    from moescale.parallel.groups import Groups
    from moescale.parallel.launchers import Place
    from moescale.parallel.topology import Topology
    from moescale.parallel.world import leave, start

    torch.set_num_threads(1)
    start(Place(0, 1, 0, 1), 60)
    groups = Groups.build(Topology())
    yield groups
    groups.destroy()
    leave()


class Trained:
    """A small mixture model, its engine, and ``backward(samples)``."""

    def __init__(self, groups: Any, zero: int, dtype: str, kind: Callable[..., torch.optim.Optimizer], moe: MoEConfig):
        from moescale.models.build import build_stage
        from moescale.models.initialise import initialise
        from moescale.models.names import NameMap
        from moescale.parallel.engine import Engine

        self.stage = build_stage(MODEL, moe, vocab=100, seq=16, dtype=dtype, groups=groups)
        names = NameMap(MODEL, moe, groups)
        self.gpt = self.stage[0]
        self.entries = names.entries(self.stage)
        initialise(self.entries.values(), MODEL, seed=0)
        self.roles = {entry.parameter: entry.role for entry in self.entries.values()}
        self.engine = Engine(self.stage, self.roles, groups, kind, zero)
        self.buffers = names.buffers(self.stage)

    def backward(self, first: int, count: int = 2, weight: float = 1.0) -> None:
        """Add the gradients of ``weight`` x the mean loss of samples ``first ... first + count``."""
        samples = [
            torch.randint(0, 100, (17,), generator=torch.Generator().manual_seed(n))
            for n in range(first, first + count)
        ]
        tokens = torch.stack(samples)
        position = torch.arange(16).expand(count, -1)
        losses = self.gpt(tokens[:, :-1], position, None, labels=tokens[:, 1:].contiguous())
        (weight * losses.mean()).backward()


def adamw(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    for group in groups:
        group["weight_decay"] = 0.1 if group.pop("decay") else 0.0
    return torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95))


@pytest.fixture
def train(one_rank: Any) -> Callable[..., Trained]:
    """Makes a model under an engine of its own."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    # One number in a vector, as Megatron's schedule sets it: the scale is copied into what stands there.
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1))

    def make(
        zero: int = 1, dtype: str = "fp32", optimizer: Callable[..., Any] = adamw, moe: MoEConfig = MOE
    ) -> Trained:
        return Trained(one_rank, zero, dtype, optimizer, moe)

    return make
