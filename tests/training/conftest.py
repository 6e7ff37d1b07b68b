"""A small corpus and run configurations for tests that train."""

import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from parity_cases import WORLDS, World
from parity_judge import STEPS

from moescale.base.config import validate
from moescale.data import prepare
from moescale.training.config import RunConfig

WORDS = [
    "the",
    "model",
    "reads",
    "a",
    "token",
    "and",
    "sends",
    "it",
    "to",
    "an",
    "expert",
    "that",
    "knows",
    "what",
    "to",
    "do",
    "with",
    "such",
    "tokens",
]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A ``data`` section over generated text, prepared in a folder of the test session's own."""
    folder = tmp_path_factory.mktemp("corpus")
    generator = random.Random(0)
    for document in range(40):
        lines = [" ".join(generator.choices(WORDS, k=12)) + f" {generator.random()}" for _ in range(30)]
        (folder / f"{document:02d}.txt").write_text("\n".join(lines))
    return {
        "path": str(folder / "prepared"),
        "domains": {"words": {"files": [str(folder / "*.txt")]}},
        "tokenizer": {"vocab": 320},
        "held_out": 0.1,
        "samples": 4096,
    }


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def start_ranks(command: list[str], world: int, devices: str = "") -> list[subprocess.Popen[str]]:
    """Start ``command`` once for each rank, with torchrun's variables. ``devices``: GPUs that they see."""
    port = str(free_port())
    processes = []
    for rank in range(world):
        variables = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": devices,
        }
        processes.append(
            subprocess.Popen(
                [sys.executable, *command],
                env={**os.environ, **variables},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return processes


@pytest.fixture(scope="session")
def run_ranks() -> Any:
    """``run_ranks(command, world)``: run and wait; fails with the output of the first rank that failed."""

    def run(command: list[str], world: int, timeout: float = 240, devices: str = "") -> None:
        processes = start_ranks(command, world, devices)
        try:
            outputs = [process.communicate(timeout=timeout)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
        for rank, (process, output) in enumerate(zip(processes, outputs, strict=True)):
            assert process.returncode == 0, f"rank {rank} of {world}:\n{output[-4000:]}"

    return run


def run_section(corpus: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A small run's configuration."""
    content: dict[str, Any] = {
        "name": "test",
        "model": {"layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "ffn": 64, "vocab_multiple": 64},
        "data": corpus,
        "optimizer": {"lr": 0.01, "eps": 1e-3},
        "schedule": {"kind": "constant", "warmup": 0},
        "training": {"seq": 32, "batch": 8, "steps": 4, "seed": 3},
        "eval": {"sequences": 8},
        "logging": {"tensorboard": False},
        "runtime": {"threads": 1},
    }
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(content.get(key), dict):
            content[key] = {**content[key], **value}
        else:
            content[key] = value
    return content


@pytest.fixture(scope="session")
def small_run(corpus: dict[str, Any]) -> Any:
    """``small_run(training={...}, moe={...})``: a small run's configuration as a dictionary."""
    return lambda **changes: run_section(corpus, **changes)


@pytest.fixture(scope="session")
def here() -> Path:
    return Path(__file__).parent


@pytest.fixture(scope="session")
def compute(small_run: Any, run_ranks: Any, here: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``compute(world, devices)``: the folder with what its ranks stored."""

    def spawn(world: World, devices: str = "") -> Path:
        out = tmp_path_factory.mktemp("world")
        cases = [
            {
                "name": name,
                "steps": STEPS,
                "config": small_run(**case.changes),
                "masked": case.masked,
                "mutation": case.mutation,
                "node_ranks": case.node_ranks,
            }
            for name, case in world.cases.items()
        ]
        prepare(validate(RunConfig, cases[0]["config"], "case").data)
        (out / "job.json").write_text(json.dumps({"cases": cases, "out": str(out)}))
        seconds = 60 + 20 * (world.ranks + len(cases))
        command = [str(here / "parity_worker.py"), str(out / "job.json")]
        run_ranks(command, world.ranks, timeout=seconds, devices=devices)
        return out

    return spawn


@pytest.fixture(scope="session")
def computed(compute: Any) -> Any:
    """``computed(world, case)``: what each rank stored; a world is spawned when it is first asked for."""
    done: dict[str, Path] = {}

    def get(where: str, name: str) -> list[dict[str, Any]]:
        if where not in done:
            done[where] = compute(WORLDS[where])
        ranks = range(WORLDS[where].ranks)
        return [torch.load(done[where] / f"{name}.{rank}.pt", weights_only=False) for rank in ranks]

    return get
