"""Fixtures that several folders of tests share."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch


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
    from moescale.parallel.topology import Topology
    from moescale.parallel.world import Place, leave, start

    torch.set_num_threads(1)
    start(Place(0, 1, 0, 1), 60)
    groups = Groups.build(Topology())
    yield groups
    groups.destroy()
    leave()
