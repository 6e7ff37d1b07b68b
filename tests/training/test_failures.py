"""Real ranks that die, stop, hang, differ or diverge: every survivor names rank, host and cause, in time."""

import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from warm_server import Server

from moescale.checkpoint.storage import Checkpoint, folder_of, steps_in
from moescale.compat.native import load_native
from moescale.scaling.record import read_record
from moescale.training.status import read_status

pytestmark = pytest.mark.distributed
HOST = socket.gethostname()
TIMEOUT = 10.0  # runtime.timeout of these runs
SLACK = 10.0  # for a busy machine
MIXTURE = {"experts": 4, "active": 2, "expert_width": 24}
ENDLESS = {"steps": 340, "batch": 12}  # longer than any of these runs lives
Begin = Callable[..., "World"]


class World:
    """The ranks of one run."""

    def __init__(self, server: Server, folder: Path, jobs: list[dict[str, Any]]):
        self._server, self.folder = server, folder
        self.logs = [Path(job["log"]) for job in jobs]
        self.pids = [server.ask({"start": job}) for job in jobs]
        self.codes: dict[int, int] = {}

    def alive(self, rank: int) -> bool:
        if rank not in self.codes:
            code = self._server.ask({"poll": self.pids[rank]})
            if code is None:
                return True
            self.codes[rank] = code
        return False

    def signal(self, rank: int, number: int) -> None:
        os.kill(self.pids[rank], number)

    def wait_for_steps(self, steps: int) -> None:
        record = self.folder / "record.jsonl"
        deadline = time.monotonic() + 120
        while not record.exists() or record.read_bytes().count(b"\n") <= steps:
            assert time.monotonic() < deadline
            assert self.alive(0), self.output(0)
            time.sleep(0.01)

    def ends(self, ranks: list[int], within: float) -> list[int]:
        """Exit codes of ``ranks``, which must have ended in time."""
        began = time.monotonic()
        while any([self.alive(rank) for rank in ranks]):
            if time.monotonic() - began > within:
                raise AssertionError("\n".join(f"rank {rank}:\n{self.output(rank)}" for rank in ranks))
            time.sleep(0.02)
        return [self.codes[rank] for rank in ranks]

    def output(self, rank: int) -> str:
        return self.logs[rank].read_text()[-4000:] if self.logs[rank].exists() else ""

    def reason(self) -> str:
        status = read_status(self.folder)
        assert status is not None
        assert status.state == "failed", self.output(0)
        return str(status.reason)

    def kill(self) -> None:
        for rank, pid in enumerate(self.pids):
            if self.alive(rank):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def server(here: Path) -> Iterator[Server]:
    with Server(here / "failing_server.py") as started:
        yield started


@pytest.fixture
def begin(server: Server, small_run: Any, tmp_path: Path) -> Iterator[Begin]:
    """``begin(ranks, faults={rank: [kind, step]}, other={rank: changes}, absent=[...], **changes)``."""
    worlds: list[World] = []

    def start(
        ranks: int,
        faults: dict[int, Any] | None = None,
        other: dict[int, Any] | None = None,
        absent: tuple[int, ...] = (),
        **changes: Any,
    ) -> World:
        port = free_port()
        jobs = []
        for rank in range(ranks):
            content = small_run(**{**changes, **(other or {}).get(rank, {})})
            content["runtime"] = {"threads": 1, "timeout": TIMEOUT}
            config = tmp_path / f"rank{rank}.yaml"
            config.write_text(yaml.safe_dump(content))
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "LOCAL_WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            jobs.append(
                {
                    "config": str(config),
                    "folder": str(tmp_path / "out"),
                    "log": str(tmp_path / f"rank{rank}.log"),
                    "environment": environment,
                    "fault": (faults or {}).get(rank),
                }
            )
        world = World(server, tmp_path / "out", [job for rank, job in enumerate(jobs) if rank not in absent])
        worlds.append(world)
        return world

    yield start
    for world in worlds:
        world.kill()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def said(world: World, rank: int) -> str:
    """What a survivor prints about another's failure."""
    found = re.search(rf"^failed \(rank {rank} on {re.escape(HOST)}\): (.*)$", world.output(rank), re.M)
    assert found is not None, world.output(rank)
    return found.group(1)


@pytest.mark.parametrize("victim", [0, 2])
def test_a_killed_rank(begin: Begin, victim: int) -> None:
    """The survivors name it at once, and say so in the status where rank 0 is gone."""
    world = begin(3, moe=MIXTURE, training=ENDLESS)
    world.wait_for_steps(3)
    world.signal(victim, signal.SIGKILL)
    survivors = [rank for rank in range(3) if rank != victim]
    assert world.ends(survivors, within=SLACK) == [1, 1]
    expected = f"rank {victim} on {HOST}: ended without a word (killed, crashed, or the host out of memory)"
    assert [said(world, rank) for rank in survivors] == [expected] * 2
    assert world.reason() == expected
    assert read_record(world.folder).last_step >= 3


@pytest.mark.parametrize(
    ("victim", "parallel"),
    [
        (0, {"expert": 2}),
        (1, {"expert": 2, "exchange": "shared"}),
        pytest.param(1, {"pipeline": 2}, marks=pytest.mark.slow),
        pytest.param(0, {"tensor": 2}, marks=pytest.mark.slow),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else str(value),
)
def test_a_stopped_rank(begin: Begin, victim: int, parallel: dict[str, Any]) -> None:
    if "exchange" in parallel and load_native():
        pytest.skip(f"native operations: {load_native()}")
    world = begin(2, moe=MIXTURE, training=ENDLESS, parallel=parallel)
    world.wait_for_steps(3)
    world.signal(victim, signal.SIGSTOP)
    survivor = 1 - victim
    assert world.ends([survivor], within=TIMEOUT + SLACK) == [1]
    expected = rf"rank {victim} on {re.escape(HOST)}: not heard from for \d+ s: stopped, powered off or cut off"
    assert re.match(expected, said(world, survivor))
    assert re.match(expected, world.reason())


def test_a_rank_that_fails_by_itself(begin: Begin) -> None:
    world = begin(2, faults={1: ["raise", 2]}, moe=MIXTURE, training=ENDLESS, parallel={"expert": 2})
    assert world.ends([0, 1], within=60) == [1, 1]
    expected = f"rank 1 on {HOST}: MemoryError: no room for the activations"
    assert said(world, 0) == expected
    assert world.reason() == expected
    assert "Traceback" in world.output(1)
    assert "Traceback" not in world.output(0)


@pytest.mark.parametrize("settings", [{"every": 1}, {"every": 3, "async": False}], ids=["background", "foreground"])
def test_a_rank_whose_disk_refuses_a_checkpoint(begin: Begin, settings: dict[str, Any]) -> None:
    """Its main thread says so; rank 0, whose thread or main thread waits for that rank's shard, ends too."""
    world = begin(2, faults={1: ["disk", 2]}, checkpoint={**settings, "keep": 9}, moe=MIXTURE, training=ENDLESS)
    assert world.ends([0, 1], within=60) == [1, 1]
    # In the background the checkpoint before may still be on its way when the disk begins to refuse.
    steps = "[23]" if settings["every"] == 1 else "3"
    expected = (
        rf"rank 1 on {HOST}: OSError: \[Errno 27\] File too large \(while the checkpoint of step {steps} was saved; "
    )
    assert re.match(expected, said(world, 0))
    assert re.match(expected, world.reason())
    root = world.folder / "checkpoints"
    assert steps_in(root) in ([[1], [1, 2]] if settings["every"] == 1 else [[]])
    for step in steps_in(root):
        Checkpoint(folder_of(root, step)).verify()


def test_a_rank_that_lives_but_does_not_come(begin: Begin) -> None:
    """It is ended too: a process that sleeps in a library does not notice by itself."""
    world = begin(3, faults={1: ["sleep", 2]}, moe=MIXTURE, training=ENDLESS)
    world.wait_for_steps(2)
    assert world.ends([0, 1, 2], within=TIMEOUT + SLACK) == [1, 1, 1]
    expected = f"rank 1 on {HOST}: alive, but took no part in what the other ranks waited 8 s for"
    assert [said(world, rank) for rank in range(3)] == [expected] * 3
    assert world.reason() == expected


def test_another_configuration(begin: Begin) -> None:
    changed = {"training": {"steps": 4, "seed": 4}, "optimizer": {"lr": 0.02}}
    world = begin(2, other={1: changed}, training={"steps": 4})
    assert world.ends([0, 1], within=60) == [2, 2]
    for rank in (0, 1):
        assert f"ranks differ from rank 0 on {HOST}" in world.output(rank)
        assert f"  rank 1 on {HOST}: optimizer.lr is 0.02, rank 0 has 0.01; " in world.output(rank)
        assert "training.seed is 4, rank 0 has 3" in world.output(rank)
        assert "Traceback" not in world.output(rank)
    assert "training.seed is 4" in world.reason()
    assert not (world.folder / "record.jsonl").exists()


def test_another_code(begin: Begin) -> None:
    world = begin(2, faults={1: ["code", 0]}, training={"steps": 4})
    assert world.ends([0, 1], within=60) == [2, 2]
    for rank in (0, 1):
        assert f'rank 1 on {HOST}: source code of moescale is "another", rank 0 has "' in world.output(rank)


def test_data_that_one_rank_lacks(begin: Begin, corpus: dict[str, Any]) -> None:
    missing = {"data": {**corpus, "domains": {"words": {"files": ["/nowhere/*.txt"]}}}}
    world = begin(2, other={1: missing}, training={"steps": 4})
    assert world.ends([0, 1], within=60) == [2, 2]
    assert f"rank 1 on {HOST}: " in world.output(0)
    assert "/nowhere/*.txt" in world.output(0)


def test_a_rank_that_never_comes(begin: Begin) -> None:
    world = begin(3, absent=(1,), training={"steps": 4, "batch": 12})
    assert world.ends([0, 1], within=TIMEOUT + SLACK) == [1, 1]
    for index in (0, 1):
        assert "rank 1 did not arrive within 8 s; 2 of 3 ranks did, on " in world.output(index)
    assert "rank 1 did not arrive" in world.reason()


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("parameter", f"parameters are not finite: layers.1.moe.experts.3.down (rank 1 on {HOST})"),
        (
            "gradient",
            f"gradients are not finite, nearest to the loss: layers.1.moe.experts.2.up (rank 1 on {HOST})",
        ),
    ],
)
def test_an_expert_that_breaks_is_named(begin: Begin, kind: str, named: str) -> None:
    world = begin(2, faults={1: [kind, 2]}, moe=MIXTURE, training=ENDLESS, parallel={"expert": 2})
    assert world.ends([0, 1], within=60) == [1, 1]
    expected = f"loss or gradient is not finite at step 3: the run diverged; {named}"
    assert world.reason() == expected
    record = read_record(world.folder)
    assert record.end is not None
    assert record.end["why"] == expected
