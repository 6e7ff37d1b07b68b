"""Going on from a checkpoint on the same ranks, on others and on another number of them, in real runs."""

import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fake_ranks import whole_tensors
from warm_server import Server

from moescale.checkpoint.storage import Checkpoint, folder_of, steps_in
from moescale.scaling.record import Record, read_record, same

pytestmark = pytest.mark.distributed
# What a step leaves to the next one besides parameters and moments: selection biases and loads.
CARRYING = {"experts": 4, "active": 2, "expert_width": 24, "balance": "global", "bias_rate": 0.01, "capacity": 1.0}
Train = Callable[..., Record]


@pytest.fixture(scope="module")
def server(here: Path) -> Iterator[Server]:
    with Server(here / "failing_server.py") as started:
        yield started


@pytest.fixture
def train(server: Server, small_run: Any, tmp_path: Path) -> Train:
    """``train(folder, ranks, steps=, parallel=, ...)``: run to the end on real ranks; returns the record."""

    def run(folder: Path, ranks: int, steps: int, **changes: Any) -> Record:
        settings = {"every": 6, "keep_every": 6}
        content = small_run(training={"steps": steps}, moe=CARRYING, checkpoint=settings, eval={}, **changes)
        config = tmp_path / f"{folder.name}.yaml"
        config.write_text(yaml.safe_dump(content))
        logs = [tmp_path / f"{folder.name}.{rank}.log" for rank in range(ranks)]
        common = {"config": str(config), "folder": str(folder), "fault": None}
        environments = variables_of(ranks) if ranks > 1 else [{}]
        running = {
            server.ask({"start": {**common, "log": str(log), "environment": environment}}): log
            for log, environment in zip(logs, environments, strict=True)
        }
        deadline = time.monotonic() + 60 + steps * ranks
        while running:
            for pid, log in list(running.items()):
                code = server.ask({"poll": pid})
                if code is not None:
                    assert code == 0, log.read_text()[-4000:]
                    del running[pid]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return read_record(folder, strict=True)

    return run


def variables_of(world: int) -> list[dict[str, str]]:
    """What torchrun tells each rank."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    common = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), **common} for rank in range(world)]


def as_of(source: Path, step: int, target: Path) -> Path:
    """The run in ``source`` as if it had been killed after its checkpoint of ``step``."""
    shutil.copytree(source, target)
    (target / "status.json").unlink()
    for later in steps_in(target / "checkpoints"):
        if later > step:
            shutil.rmtree(folder_of(target / "checkpoints", later))
    return target


def assert_goes_on(found: Record, wanted: Record, first: int) -> None:
    """The loss within 1e-4 in every step after ``first``, what the router does too, and every step once."""
    assert found.headers[-1]["resumed_from"] == first
    assert [line["step"] for line in found.steps] == [line["step"] for line in wanted.steps]
    for mine, theirs in zip(found.steps[first:], wanted.steps[first:], strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4), mine["step"]
        assert mine["tokens"] == theirs["tokens"]
        for layer, other in zip(mine["router"], theirs["router"], strict=True):
            assert layer["bias_range"] == pytest.approx(other["bias_range"])


def test_the_loss_of_spread_experts_goes_on_as_if_nothing_had_happened(train: Train, tmp_path: Path) -> None:
    """Megatron-LM#761: with expert parallelism the loss after a resume was another than without one.

    Dense and expert parameters have optimizer states of their own; both must come back, on two ranks, bit for bit.
    """
    layout = {"parallel": {"expert": 2}}
    whole = train(tmp_path / "whole", 2, 12, **layout)
    resumed = train(as_of(tmp_path / "whole", 6, tmp_path / "resumed"), 2, 12, **layout)
    assert resumed.headers[-1]["resumed_from"] == 6
    assert same(whole, resumed) == []
    one, other = (Checkpoint(folder_of(tmp_path / name / "checkpoints", 12)) for name in ("whole", "resumed"))
    assert one.extra == other.extra
    found = whole_tensors(other)
    for key, values in whole_tensors(one).items():
        assert torch.equal(values, found[key]), key


def test_a_checkpoint_that_is_damaged_for_one_rank_serves_none(train: Train, tmp_path: Path) -> None:
    """Each rank reads its own part alone; all go back to the one before, and what was read of this one is gone."""
    layout = {"parallel": {"expert": 2}}
    whole = train(tmp_path / "whole", 2, 18, **layout)
    folder = as_of(tmp_path / "whole", 12, tmp_path / "damaged")
    shard = folder_of(folder / "checkpoints", 12) / "rank-00001-000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-5] ^= 32
    shard.write_bytes(content)
    found = train(folder, 2, 18, **layout)
    assert same(whole, found) == []
    assert found.headers[-1]["resumed_from"] == 6
    assert any(e["what"] == "damaged checkpoint" and "rank-00001-000" in e["why"] for e in found.events)


def test_without_a_good_checkpoint_a_run_starts_anew(train: Train, tmp_path: Path) -> None:
    """Nothing of what was read stays behind, in the model or in the optimizer."""
    whole = train(tmp_path / "whole", 1, 9)
    folder = as_of(tmp_path / "whole", 6, tmp_path / "damaged")
    shard = folder_of(folder / "checkpoints", 6) / "rank-00000-000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-5] ^= 32  # the last of what is read
    shard.write_bytes(content)
    found = train(folder, 1, 9)
    assert found.headers[-1]["resumed_from"] is None
    assert same(whole, found) == []


def test_another_layout_and_back(train: Train, tmp_path: Path) -> None:
    """One rank, then two with experts and tensors spread, then one again."""
    whole = train(tmp_path / "whole", 1, 18)
    moved = as_of(tmp_path / "whole", 6, tmp_path / "moved")
    spread = train(moved, 2, 18, parallel={"tensor": 2, "expert": 2})
    assert_goes_on(spread, whole, 6)
    back = train(as_of(moved, 12, tmp_path / "back"), 1, 18)
    assert_goes_on(back, whole, 12)
    assert [header["topology"]["world"] for header in back.headers] == [1, 2, 1]


def test_latent_attention_goes_on(train: Train, tmp_path: Path) -> None:
    """On the same rank with every number the same, and on two with heads cut and latents whole."""
    mla = {"q_rank": 11, "kv_rank": 13, "nope_dim": 8, "rope_dim": 6, "value_dim": 10}
    changes = {"model": {"kv_heads": 4, "mla": mla, "yarn": {"factor": 4, "original_seq": 16}}}
    whole = train(tmp_path / "whole", 1, 12, **changes)
    assert whole.steps[-1]["loss"] < whole.steps[0]["loss"] - 0.2
    again = train(as_of(tmp_path / "whole", 6, tmp_path / "again"), 1, 12, **changes)
    assert again.headers[-1]["resumed_from"] == 6
    assert same(whole, again) == []
    spread = train(as_of(tmp_path / "whole", 6, tmp_path / "spread"), 2, 12, parallel={"tensor": 2}, **changes)
    assert_goes_on(spread, whole, 6)


LAYOUTS = {
    "dp2": (2, {}),
    "ep2": (2, {"expert": 2}),
    "tp2": (2, {"tensor": 2}),
    "pp2": (2, {"pipeline": 2}),
    "tp2-ep2-dp2": (4, {"tensor": 2, "expert": 2}),
    "pp2-ep2": (4, {"pipeline": 2, "expert": 2}),
}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_hundred_steps_at_other_layouts(train: Train, tmp_path: Path) -> None:
    """From one rank to six layouts on two and four: a hundred fp32 steps within 1e-4 of those of one rank."""
    whole = train(tmp_path / "whole", 1, 106)
    for name, (ranks, parallel) in LAYOUTS.items():
        folder = as_of(tmp_path / "whole", 6, tmp_path / name)
        assert_goes_on(train(folder, ranks, 106, parallel=parallel), whole, 6)
