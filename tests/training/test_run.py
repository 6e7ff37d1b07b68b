"""Whole runs in processes of their own: ending, stopping, resuming, killing, branching, two ranks."""

import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from warm_server import Server

from moescale.checkpoint.storage import Checkpoint, folder_of, steps_in
from moescale.scaling.condensed import CONDENSED, read_condensed
from moescale.scaling.record import Record, read_record, same
from moescale.training.status import current_status, read_status

Starter = Callable[..., "Run"]
MIXTURE = {"experts": 4, "active": 2, "expert_width": 24}
# What a step leaves to the next one besides parameters: selection biases and loads.
CARRYING = {**MIXTURE, "balance": "global", "bias_rate": 0.01, "capacity": 1.0}
STEPS = 40


@pytest.fixture
def write_config(small_run: Any, tmp_path: Path) -> Callable[..., Path]:
    def write(name: str = "run", **changes: Any) -> Path:
        path = tmp_path / f"{name}.yaml"
        content = small_run(name=name, **{"checkpoint": {"every": 5}, "eval": {"every": 10, "sequences": 8}, **changes})
        path.write_text(yaml.safe_dump(content))
        return path

    return write


class Run:
    """A forked run: what `subprocess.Popen` is for a started one."""

    def __init__(self, server: "Server", config: Path, folder: Path, log: Path, largest_file: int | None):
        self._server, self._log = server, log
        self.pid = server.ask({"start": [str(config), str(folder), str(log), largest_file]})
        self.code: int | None = None

    def poll(self) -> int | None:
        if self.code is None:
            self.code = self._server.ask({"poll": self.pid})
        return self.code

    def signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def wait(self, timeout: float = 120) -> int:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            assert time.monotonic() < deadline, f"still running after {timeout} s:\n{self.output()}"
            time.sleep(0.01)
        assert self.code is not None
        return self.code

    def output(self) -> str:
        return self._log.read_text()[-3000:] if self._log.exists() else ""


@pytest.fixture(scope="module")
def server(here: Path) -> Iterator[Server]:
    with Server(here / "run_server.py") as started:
        yield started


@pytest.fixture
def begin(server: Server, tmp_path: Path) -> Starter:
    def start(config: Path, folder: Path, largest_file: int | None = None) -> Run:
        return Run(server, config, folder, tmp_path / f"{folder.name}.log", largest_file)

    return start


def finish(run: Run, code: int = 0) -> str:
    assert run.wait() == code, run.output()
    return run.output()


def lines_in(folder: Path) -> int:
    record = folder / "record.jsonl"
    return record.read_bytes().count(b"\n") if record.exists() else 0


def wait_for_steps(process: "Run", folder: Path, more: int) -> None:
    """Until the record has ``more`` lines more, or the process has ended."""
    before = lines_in(folder)
    while process.poll() is None and lines_in(folder) < before + more:
        time.sleep(0.005)


def strict(folder: Path) -> Record:
    return read_record(folder, strict=True)


def test_a_run_ends_in_a_whole_record(write_config: Callable[..., Path], begin: Starter, tmp_path: Path) -> None:
    config = write_config(moe=MIXTURE, noise={"every": 2, "small_batch": 4})
    finish(begin(config, tmp_path / "out"))
    record, status = strict(tmp_path / "out"), read_status(tmp_path / "out")
    assert [line["step"] for line in record.steps] == [1, 2, 3, 4]
    assert [line["noise"] is not None for line in record.steps] == [False, True, False, True]
    assert {line["domain"] for line in record.evals} == {"words", "held_out"}
    assert record.end is not None
    assert record.end["state"] == "done"
    assert status is not None
    assert (status.state, status.step, status.steps_total, status.attempt) == ("done", 4, 4, 1)
    assert json.loads((tmp_path / "out/environment.json").read_text())["deepspeed"].startswith("0.19")
    kept = (tmp_path / "out" / CONDENSED).read_bytes()  # left by the run, and what reading its record leaves
    (tmp_path / "out" / CONDENSED).unlink()
    read_condensed(tmp_path / "out")
    assert (tmp_path / "out" / CONDENSED).read_bytes() == kept
    untouched = (tmp_path / "out/record.jsonl").read_bytes()
    finish(begin(config, tmp_path / "out"))  # done is done
    assert (tmp_path / "out/record.jsonl").read_bytes() == untouched


def test_downstream_tasks_stand_in_the_record(
    write_config: Callable[..., Path], begin: Starter, tmp_path: Path
) -> None:
    questions = [
        {"context": "the model reads a token and", "choices": [" sends it to an expert", " 世界"], "answer": 0},
        {"context": "the model reads a token and", "choices": [" 世界", " sends it to an expert"], "answer": 0},
    ]
    (tmp_path / "words.jsonl").write_text("".join(f"{json.dumps(question)}\n" for question in questions))
    tasks = {
        "split": {"file": str(tmp_path / "words.jsonl")},
        "go-on": {"continuations": {"domain": "words", "count": 20, "context": 30, "length": 10}},
    }
    evaluated = {"every": 2, "sequences": 8, "tasks": tasks}
    config = write_config(moe=MIXTURE, eval=evaluated, training={"steps": 4})
    finish(begin(config, tmp_path / "out"))
    evals = strict(tmp_path / "out").evals
    assert [(line["step"], line["domain"]) for line in evals] == [
        (step, domain) for step in (2, 4) for domain in ("go-on", "split", "words", "held_out")
    ]  # the held-out loss stands last, where readers of the newest line look for it
    go_on, split = evals[4:6]
    assert split["score"] == split["task"]["raw_score"] == 0.5  # words it has seen are likelier than bytes it has not
    assert (split["task"]["questions"], split["task"]["chance"]) == (2, 0.5)
    assert go_on["score"] * 20 == int(go_on["score"] * 20)
    assert 0 < go_on["loss"] < 10
    assert all("task" not in line for line in evals if line["domain"] in ("words", "held_out"))
    missing = write_config("missing", eval={**evaluated, "tasks": {"split": {"file": str(tmp_path / "no.jsonl")}}})
    output = finish(begin(missing, tmp_path / "missing"), code=2)
    assert "eval.tasks.split.file" in output
    assert "Traceback" not in output


def test_another_run_in_the_folder_is_refused(
    write_config: Callable[..., Path], begin: Starter, tmp_path: Path
) -> None:
    finish(begin(write_config("first"), tmp_path / "out"))
    output = finish(begin(write_config("second", optimizer={"lr": 0.5}), tmp_path / "out"), code=2)
    assert "holds another run" in output
    assert "Traceback" not in output


def test_a_diverging_run_fails_with_a_reason(write_config: Callable[..., Path], begin: Starter, tmp_path: Path) -> None:
    config = write_config(optimizer={"lr": 1e30, "clip": 0}, training={"steps": 20})
    finish(begin(config, tmp_path / "out"), code=1)
    status = read_status(tmp_path / "out")
    assert status is not None
    assert status.state == "failed"
    assert "diverged" in str(status.reason)


@pytest.fixture
def undisturbed(write_config: Callable[..., Path], begin: Starter, tmp_path: Path) -> tuple[Path, Record]:
    config = write_config(moe=CARRYING, training={"steps": STEPS}, noise={"every": 7, "small_batch": 4})
    finish(begin(config, tmp_path / "undisturbed"))
    return config, strict(tmp_path / "undisturbed")


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGUSR1, "file"])
def test_stop_saves_and_the_next_start_goes_on(
    how: Any, undisturbed: tuple[Path, Record], begin: Starter, tmp_path: Path
) -> None:
    config, whole = undisturbed
    folder = tmp_path / "stopped"
    process = begin(config, folder)
    wait_for_steps(process, folder, 8)
    if how == "file":
        (folder / "stop").write_text("room for others\n")
    else:
        process.signal(how)
    finish(process, code=75)
    status = read_status(folder)
    assert status is not None
    assert (status.state, status.reason) == ("preempted", "room for others" if how == "file" else f"signal {how.name}")
    assert not (folder / "stop").exists()
    finish(begin(config, folder))
    assert same(whole, strict(folder)) == []


def kill_and_restart(config: Path, folder: Path, begin: Starter, kills: int, seed: int) -> None:
    """SIGKILL at random moments, imports and start-up included, and start again each time."""
    generator = random.Random(seed)
    done = 0
    while done < kills:
        process = begin(config, folder)
        if generator.random() < 0.2:
            time.sleep(generator.uniform(0, 1))
        else:
            wait_for_steps(process, folder, generator.randint(1, 9))
            time.sleep(generator.uniform(0, 0.03))
        if process.poll() is not None:
            assert process.poll() == 0, process.output()
            (folder / "status.json").unlink()  # finished before its time: let it find its end again
        else:
            done += 1
            process.signal(signal.SIGKILL)
        process.wait()
    finish(begin(config, folder))


def test_a_killed_run_is_not_called_running(write_config: Callable[..., Path], begin: Starter, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    process = begin(write_config(training={"steps": 10 * STEPS}), folder)
    wait_for_steps(process, folder, 3)
    alive = current_status(folder)
    process.signal(signal.SIGKILL)
    process.wait()
    dead, written = current_status(folder), read_status(folder)
    assert alive is not None
    assert dead is not None
    assert written is not None
    assert (alive.state, written.state, dead.state) == ("running", "running", "failed")
    assert "killed" in str(dead.reason)


def test_killed_three_times(undisturbed: tuple[Path, Record], begin: Starter, tmp_path: Path) -> None:
    config, whole = undisturbed
    kill_and_restart(config, tmp_path / "killed", begin, kills=3, seed=1)
    assert same(whole, strict(tmp_path / "killed")) == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_twenty_five_times(write_config: Callable[..., Path], begin: Starter, tmp_path: Path) -> None:
    config = write_config(moe=MIXTURE, training={"steps": 200}, noise={"every": 7, "small_batch": 4})
    finish(begin(config, tmp_path / "undisturbed"))
    kill_and_restart(config, tmp_path / "killed", begin, kills=25, seed=2)
    killed = strict(tmp_path / "killed")
    assert same(strict(tmp_path / "undisturbed"), killed) == []
    assert len(killed.headers) >= 15


def kill_while_saving(config: Path, folder: Path, begin: Starter, kills: int, seed: int) -> int:
    """SIGKILL at random moments of writing, checking, renaming and pruning; returns kills that left a torn save."""
    generator, root, torn = random.Random(seed), folder / "checkpoints", 0
    for _ in range(kills):
        old = set(root.glob(".step-*.tmp"))
        process = begin(config, folder)
        while process.poll() is None and not set(root.glob(".step-*.tmp")) - old:
            time.sleep(0.001)
        time.sleep(generator.uniform(0, 0.15))
        assert process.poll() is None, process.output()
        before = steps_in(root)
        process.signal(signal.SIGKILL)
        process.wait()
        left = steps_in(root)
        torn += bool(set(root.glob(".step-*.tmp")) - old)
        assert left[-1:] >= before[-1:]
        for step in left:
            Checkpoint(folder_of(root, step)).verify()
        # A save begins after every step, and waits for the one before: two steps at most are not in a checkpoint yet.
        recorded = read_record(folder).last_step or 0
        assert recorded - (left[-1] if left else 0) <= 2
    return torn


@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_killed_while_saving(kills: int, write_config: Callable[..., Path], begin: Starter, tmp_path: Path) -> None:
    """A checkpoint after every step, of a state large enough to take a while: always a good one is left."""
    model = {"width": 128, "ffn": 256, "vocab_multiple": 1024}
    changes = {"model": model, "moe": CARRYING, "eval": {}, "training": {"steps": 10 * kills, "batch": 1}}
    finish(begin(write_config("undisturbed", **changes, checkpoint={"every": 0}), tmp_path / "undisturbed"))
    config = write_config("killed", **changes, checkpoint={"every": 1, "keep": 2})
    torn = kill_while_saving(config, tmp_path / "killed", begin, kills, seed=3)
    finish(begin(config, tmp_path / "killed"))
    assert same(strict(tmp_path / "undisturbed"), strict(tmp_path / "killed")) == []
    assert len(strict(tmp_path / "killed").headers) == kills + 1
    assert kills < 10 or torn > kills / 4
    assert not list((tmp_path / "killed/checkpoints").glob(".*"))


def test_which_checkpoints_stay(write_config: Callable[..., Path], begin: Starter, tmp_path: Path) -> None:
    """The last, those of ``keep_every``, and the record says when each was saved; also without a second thread."""
    for background in (True, False):
        settings = {"every": 2, "keep": 1, "keep_every": 6, "async": background}
        folder = tmp_path / str(background)
        finish(begin(write_config("run", training={"steps": 15}, eval={}, checkpoint=settings), folder))
        assert steps_in(folder / "checkpoints") == [6, 12, 15]
        saved = [event["step"] for event in strict(folder).events if event["what"] == "saved"]
        assert saved == [2, 4, 6, 8, 10, 12, 14, 15]


@pytest.mark.parametrize("checkpoint_every", [5, 0], ids=["in a checkpoint", "in the record"])
def test_a_disk_that_refuses_ends_the_run_but_loses_nothing(
    checkpoint_every: int, undisturbed: tuple[Path, Record], begin: Starter, tmp_path: Path
) -> None:
    config, whole = undisturbed
    folder = tmp_path / "refused"
    content = yaml.safe_load(config.read_text())
    content["checkpoint"]["every"] = checkpoint_every
    config.write_text(yaml.safe_dump(content))
    finish(begin(config, folder, largest_file=20_000), code=1)
    status, so_far = read_status(folder), read_record(folder)
    assert status is not None
    assert status.state == "failed"
    assert "File too large" in str(status.reason)
    assert so_far.steps
    assert status.step == so_far.steps[-1]["step"]
    assert not list(folder.glob("checkpoints/step-*"))
    finish(begin(config, folder))
    assert same(whole, strict(folder)) == []


def test_damaged_checkpoint_is_passed_over(undisturbed: tuple[Path, Record], begin: Starter, tmp_path: Path) -> None:
    config, whole = undisturbed
    folder = tmp_path / "damaged"
    content = yaml.safe_load(config.read_text())
    content["checkpoint"]["keep"] = 3
    config.write_text(yaml.safe_dump(content))
    process = begin(config, folder)
    wait_for_steps(process, folder, 25)
    process.signal(signal.SIGKILL)
    process.wait()
    latest = max((folder / "checkpoints").glob("step-*"))
    shard = next(latest.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    finish(begin(config, folder))
    record = strict(folder)
    assert same(whole, record) == []
    assert any(event["what"] == "damaged checkpoint" and shard.name in event["why"] for event in record.events)


def test_a_branch_equals_a_run_of_its_own(write_config: Callable[..., Path], begin: Starter, tmp_path: Path) -> None:
    def wsd(name: str, steps: int, **more: Any) -> Path:
        schedule = {"kind": "wsd", "warmup": 2, "decay": 0.25, **more}
        run = {"schedule": schedule, "training": {"steps": steps}, "moe": CARRYING}
        return write_config(name, **run, checkpoint={"every": 0}, eval={})

    finish(begin(wsd("trunk", 16, branches=[8]), tmp_path / "trunk"))
    finish(begin(wsd("alone", 8), tmp_path / "alone"))
    parent = {"run": "../trunk", "step": 6}
    finish(begin(wsd("branch", 8, parent=parent), tmp_path / "branch"))
    alone, branch = strict(tmp_path / "alone"), strict(tmp_path / "branch")
    assert [line["step"] for line in branch.steps] == [7, 8]
    assert branch.headers[0]["parent"] == parent
    for mine, theirs in zip(branch.steps, alone.steps[6:], strict=True):
        assert (mine["loss"], mine["lr"], mine["router"]) == (theirs["loss"], theirs["lr"], theirs["router"])
        assert all(layer["bias_range"] > 0 for layer in mine["router"])
    for name, wrong, said in (
        ("another", {"parent": parent, "warmup": 3}, "the trunk differs in schedule.warmup"),
        ("unkept", {"parent": {**parent, "step": 5}}, "kept no checkpoint of that step"),
        ("nowhere", {"parent": {**parent, "run": "../else"}}, "holds no run"),
    ):
        assert said in finish(begin(wsd(name, 8, **wrong), tmp_path / name), code=2)


@pytest.mark.distributed
def test_two_ranks_go_on_where_one_stopped(
    write_config: Callable[..., Path], begin: Starter, run_ranks: Any, here: Path, tmp_path: Path
) -> None:
    """A run may change its layout: the loss goes on as the single process's does."""
    changes = {"moe": CARRYING, "training": {"steps": 12}, "checkpoint": {"every": 6}}
    finish(begin(write_config("alone", **changes), tmp_path / "alone"))
    whole = strict(tmp_path / "alone")
    config = write_config("moved", **changes)
    process = begin(config, tmp_path / "moved")
    while process.poll() is None and not (tmp_path / "moved/checkpoints/step-00000006").exists():
        time.sleep(0.005)
    process.signal(signal.SIGKILL)
    process.wait()
    spread = write_config("moved", **changes, parallel={"expert": 2})
    run_ranks([str(here / "run_worker.py"), str(spread), str(tmp_path / "moved")], 2)
    moved = strict(tmp_path / "moved")
    assert moved.headers[-1]["topology"]["expert"] == 2
    for one, two in zip(whole.steps, moved.steps, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert two["grad_norm"]["expert"] == pytest.approx(one["grad_norm"]["expert"], rel=1e-3)
        for alone, spread in zip(one["router"], two["router"], strict=True):
            assert spread["bias_range"] == pytest.approx(alone["bias_range"])
