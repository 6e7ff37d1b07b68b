"""Where a process finds itself among the ranks, and how long it waits for them."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from moescale.base.errors import UserError
from moescale.parallel.failure import Patience
from moescale.parallel.world import Place, blame, limit_waits

VARIABLES = {
    "RANK": "3",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_alone(environment: pytest.MonkeyPatch) -> None:
    assert Place.from_environment() == Place(0, 1, 0, 1)
    environment.setenv("LOCAL_RANK", "0")  # set by world.start for DeepSpeed
    assert Place.from_environment() == Place(0, 1, 0, 1)


def test_under_torchrun(environment: pytest.MonkeyPatch) -> None:
    for name, value in VARIABLES.items():
        environment.setenv(name, value)
    assert Place.from_environment() == Place(3, 8, 1, 2)


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_half_an_environment_is_refused(environment: pytest.MonkeyPatch, missing: str) -> None:
    for name, value in VARIABLES.items():
        if name != missing:
            environment.setenv(name, value)
    with pytest.raises(UserError, match=f"but not {missing}; start with torchrun"):
        Place.from_environment()


def test_no_group_waits_longer_than_told(one_rank: Any) -> None:
    """Megatron and DeepSpeed make groups with time limits of 30 minutes."""

    def limits() -> set[float]:
        groups = dist.distributed_c10d._world.pg_map
        return {group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups}

    limit_waits(60)
    assert limits() == {Patience(60).wait}


def test_alone_there_is_nobody_else_to_blame() -> None:
    assert blame(MemoryError("no room")).text == "MemoryError: no room"
    assert blame(UserError("training.steps (0): too few")).text == "training.steps (0): too few"
