"""What a process takes for itself, how long it waits for the others, and whom it blames."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from moescale.base.errors import UserError
from moescale.parallel.failure import Patience
from moescale.parallel.launchers import Place
from moescale.parallel.world import blame, device_of, limit_waits


@pytest.mark.parametrize(
    ("place", "devices", "mine"), [((5, 8, 1, 4), 4, 1), ((5, 8, 1, 4), 8, 1), ((5, 8, 1, 4), 1, 0)]
)
def test_a_rank_has_a_device_of_its_own(place: tuple[int, int, int, int], devices: int, mine: int) -> None:
    """One visible device is what Slurm's --gpus-per-task leaves to each task."""
    assert device_of(Place(*place), devices) == mine


def test_fewer_devices_than_ranks_are_refused() -> None:
    with pytest.raises(UserError, match=r"4 ranks on .* have 2 devices"):
        device_of(Place(5, 8, 1, 4), 2)


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
