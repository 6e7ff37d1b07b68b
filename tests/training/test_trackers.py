"""TensorBoard and Weights & Biases beside the record: a run that is stopped, killed and resumed is one curve."""

import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from warm_server import Server

from moescale.base.errors import UserError
from moescale.scaling.record import Record, read_record
from moescale.training import wandb_follower
from moescale.training.curves import curves
from moescale.training.status import read_status
from moescale.training.wandb_follower import identity, require_wandb

needs_wandb = pytest.mark.skipif(find_spec("wandb") is None, reason="pip install 'moescale[wandb]'")
STEPS = 30


def config_of(small_run: Any, path: Path, logging: dict[str, Any]) -> Path:
    content = small_run(
        training={"steps": STEPS}, logging=logging, checkpoint={"every": 10}, eval={"every": 10, "sequences": 8}
    )
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def resumed(small_run: Any, here: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was killed between two checkpoints and started again, with both trackers."""
    home = tmp_path_factory.mktemp("trackers")
    wandb = {"project": "p", "group": "g", "every": 0} if find_spec("wandb") else None
    config = config_of(small_run, home / "run.yaml", {"tensorboard": True, "wandb": wandb})
    folder, log = home / "out", home / "log"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        server = Server(here / "run_server.py")
    with server:
        for last_start in (False, True):
            pid, code = server.ask({"start": [str(config), str(folder), str(log), None]}), None
            deadline = time.monotonic() + 180
            while code is None:
                code = server.ask({"poll": pid})
                assert time.monotonic() < deadline, log.read_text()
                if (
                    code is None
                    and not last_start
                    and (folder / "checkpoints" / "step-00000010").exists()  # written beside the steps that follow
                    and read_record(folder).last_step >= 13
                ):
                    os.kill(pid, signal.SIGKILL)
                time.sleep(0.01)
            assert code == (0 if last_start else -signal.SIGKILL), log.read_text()
    return folder


def expected(record: Record) -> dict[int, dict[str, float]]:
    """What trackers should have for each step."""
    rows: dict[int, dict[str, float]] = {}
    for line in (*record.steps, *record.evals):
        rows.setdefault(line["step"], {}).update(curves(line))
    return rows


def test_tensorboard_has_each_step_once(resumed: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(resumed / "logs" / "tensorboard"))
    events.Reload()
    record = read_record(resumed)
    assert [header["resumed_from"] for header in record.headers] == [None, 10]
    losses = {line["step"]: line["loss"] for line in record.steps}
    drawn = [(event.step, event.value) for event in events.Scalars("loss")]
    assert [step for step, _ in drawn] == sorted({step for step, _ in drawn})
    assert len(drawn) > 1
    for step, loss in drawn:
        assert loss == pytest.approx(losses[step], rel=1e-6)
    held_out = [(event.step, event.value) for event in events.Scalars("eval/held_out/loss")]
    assert [step for step, _ in held_out] == [10, 20, 30]


def sent(folder: Path) -> Iterator[tuple[str, Any]]:
    """Records in a folder that W&B's client wrote offline: a LevelDB log, 32 KiB blocks of crc, size, kind, part."""
    from wandb.proto.wandb_internal_pb2 import Record as Sent

    content = next(folder.glob("*.wandb")).read_bytes()
    at, parts = 7, b""  # after the file's own header
    while at + 7 <= len(content):
        room = 32768 - at % 32768
        if room < 7:
            at += room
            continue
        size, kind = struct.unpack_from("<HB", content, at + 4)
        parts += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record = Sent()
            record.ParseFromString(parts)
            yield record.WhichOneof("record_type"), record
            parts = b""


def rows_of(folder: Path) -> dict[int, dict[str, float]]:
    """History by W&B's own step; a step that came twice is an error."""
    rows: dict[int, dict[str, float]] = {}
    for kind, record in sent(folder):
        if kind == "history":
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            assert record.history.step.num not in rows
            rows[record.history.step.num] = row
    return rows


@needs_wandb
def test_wandb_has_each_step_once_under_one_id(resumed: Path) -> None:
    runs = sorted((resumed / "logs" / "wandb" / "wandb").glob("offline-run-*"))
    name = identity(resumed)
    assert len(runs) == 2
    assert all(path.name.endswith(name) for path in runs)
    # Offline nobody says what W&B has, so the last start has written the whole run: that is the one to sync.
    rows, record = rows_of(runs[-1]), read_record(resumed)
    assert list(rows) == list(range(1, STEPS + 1))
    for step, row in expected(record).items():
        assert {key: rows[step][key] for key in row} == pytest.approx(row)
    kinds = {kind: content for kind, content in sent(runs[-1])}
    assert kinds["exit"].exit.exit_code == 0
    assert (kinds["run"].run.project, kinds["run"].run.run_group, kinds["run"].run.run_id) == ("p", "g", name)


@needs_wandb
@pytest.mark.parametrize(
    "variables",
    [
        pytest.param({}, id="no login"),
        pytest.param(
            {"WANDB_API_KEY": "a" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}, id="no network", marks=pytest.mark.slow
        ),
    ],
)
def test_a_tracker_that_fails_stops_nothing(variables: dict[str, str], small_run: Any, tmp_path: Path) -> None:
    config = config_of(small_run, tmp_path / "run.yaml", {"tensorboard": False, "wandb": {"project": "p"}})
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    environment |= {"HOME": str(tmp_path), **variables}  # nobody's login
    command = [sys.executable, "-m", "moescale", "train", str(config), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    ended = time.time()
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("warning: logging.wandb: ") == 1, done.stderr
    assert "Traceback" not in done.stderr
    status = read_status(tmp_path / "out")
    assert status is not None
    assert (status.state, status.step) == ("done", STEPS)
    assert ended - status.updated < wandb_follower.PATIENCE + 10


def test_a_missing_client_is_said_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb_follower, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"logging.wandb: .*pip install 'moescale\[wandb\]'"):
        require_wandb()


def test_the_id_stays_with_the_folder(tmp_path: Path) -> None:
    first = identity(tmp_path / "a")
    assert first != identity(tmp_path / "b")
    (tmp_path / "a").rename(tmp_path / "c")
    assert identity(tmp_path / "c") == first
