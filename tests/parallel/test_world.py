"""Where a process finds itself among the ranks."""

import pytest

from moescale.base.errors import UserError
from moescale.parallel.world import Place

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
