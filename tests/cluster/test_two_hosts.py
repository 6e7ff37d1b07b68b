"""A run over two hosts, and what becomes of it when the network between them is cut."""

import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from moescale.scaling.record import read_record
from moescale.training.status import read_status

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
TIMEOUT = 12  # runtime.timeout of the run whose network is cut
SLACK = 30  # for torchrun, on a busy machine


def write(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(content))
    return path


def train_on(hosts: list[Any], config: Path, out: Path, logs: list[Path]) -> list[subprocess.Popen[bytes]]:
    """torchrun on both hosts, one rank each."""
    return [
        host.start(
            [
                *(sys.executable, "-m", "torch.distributed.run"),
                *("--nnodes", "2", "--node-rank", str(number), "--nproc-per-node", "1"),
                *("--master-addr", hosts[0].name, "--master-port", "29500"),
                *("--module", "moescale", "train", str(config), "--out", str(out)),
            ],
            logs[number],
        )
        for number, host in enumerate(hosts)
    ]


def test_the_loss_is_that_of_one_process(hosts: list[Any], run_section: dict[str, Any], tmp_path: Path) -> None:
    alone = write(tmp_path / "alone.yaml", run_section)
    command = [sys.executable, "-m", "moescale", "train", str(alone), "--out", str(tmp_path / "alone")]
    subprocess.run(command, check=True, timeout=240)
    spread = write(tmp_path / "spread.yaml", {**run_section, "parallel": {"expert": 2}})
    logs = [tmp_path / "a.log", tmp_path / "b.log"]
    for process, log in zip(train_on(hosts, spread, tmp_path / "spread", logs), logs, strict=True):
        assert process.wait(timeout=240) == 0, log.read_text()[-4000:]
    one, two = read_record(tmp_path / "alone"), read_record(tmp_path / "spread")
    assert two.headers[0]["topology"]["expert"] == 2
    assert two.headers[0]["topology"]["nodes"] == 2
    assert [line["loss"] for line in two.steps] == pytest.approx([line["loss"] for line in one.steps], rel=1e-5)


def test_a_cut_network(hosts: list[Any], run_section: dict[str, Any], tmp_path: Path) -> None:
    """Both sides end in time, each with the name of the rank and host that it cannot hear."""
    endless = {
        **run_section,
        "parallel": {"expert": 2},
        "training": {**run_section["training"], "steps": 1000},
        "runtime": {"threads": 1, "timeout": TIMEOUT},
    }
    out, logs = tmp_path / "out", [tmp_path / "a.log", tmp_path / "b.log"]
    processes = train_on(hosts, write(tmp_path / "run.yaml", endless), out, logs)
    deadline = time.monotonic() + 240
    while not (out / "record.jsonl").exists() or len(read_record(out).steps) < 3:
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes), logs[0].read_text()[-4000:]
        time.sleep(0.05)
    hosts[1].cut()
    began = time.monotonic()
    silence = r"not heard from for \d+ s: stopped, powered off or cut off from the network"
    said = [
        f"failed (rank 0 on node-a): rank 1 on node-b: {silence}",
        f"failed (rank 1 on node-b): rank 0 on node-a: {silence}",
    ]
    for process, log, expected in zip(processes, logs, said, strict=True):
        assert process.wait(timeout=TIMEOUT + SLACK) != 0
        text = log.read_text()
        assert re.search(expected.replace("failed (", r"failed \(").replace("): ", r"\): "), text), text[-4000:]
    assert time.monotonic() - began < TIMEOUT + SLACK
    status = read_status(out)
    assert status is not None
    assert status.state == "failed"
    assert "on node-" in str(status.reason)
