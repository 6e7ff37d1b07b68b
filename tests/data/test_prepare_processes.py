"""Several processes at once, killed ones, and a full disk: forked children do the real thing."""

import multiprocessing
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from moescale.base.errors import UserError
from moescale.data import DataConfig, DomainConfig, TokenizerConfig, prepare
from moescale.data.cache import read_manifest

fork = multiprocessing.get_context("fork")


def config_in(path: Path, corpus: Path) -> DataConfig:
    domains = {"files": DomainConfig(files=(str(corpus / "*.txt"),))}
    return DataConfig(path=str(path), domains=domains, tokenizer=TokenizerConfig(vocab=330), held_out=0.1)


def start(task: Callable[[], None]) -> multiprocessing.process.BaseProcess:
    child = fork.Process(target=task)
    child.start()
    return child


def leftovers(path: Path) -> list[str]:
    return [entry.name for entry in path.iterdir() if ".building-" in entry.name or entry.name.endswith(".tmp")]


def test_one_builds_and_the_others_wait(corpus: Path, tmp_path: Path, prepared: object) -> None:
    config, said = config_in(tmp_path, corpus), tmp_path / "said.txt"

    def run() -> None:
        with said.open("a") as sys.stderr:
            prepare(config, progress=True)

    children = [start(run) for _ in range(5)]
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0] * 5
    assert said.read_text().count("tokenizer: training 330 pieces") == 1
    assert leftovers(tmp_path) == []


def test_killed_at_any_moment_leaves_nothing_that_is_taken_for_whole(
    corpus: Path, tmp_path: Path, prepared: object
) -> None:
    started = time.monotonic()
    whole = prepare(config_in(tmp_path / "undisturbed", corpus))
    duration = time.monotonic() - started
    path = tmp_path / "killed"
    config = config_in(path, corpus)
    draw = random.Random(0)
    seen_half_built = 0
    for _ in range(20):
        child = start(lambda: prepare(config))
        time.sleep(draw.uniform(0, 1.1 * duration))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        folder = path / whole.data_hash
        if folder.exists():
            read_manifest(folder)
            (folder / "manifest.json").unlink()
        seen_half_built += path.exists() and bool(leftovers(path))
    assert seen_half_built
    again = prepare(config)
    assert leftovers(path) == []
    assert again.manifest == whole.manifest
    for file in whole.folder.iterdir():
        assert file.read_bytes() == (again.folder / file.name).read_bytes(), file.name


@pytest.mark.parametrize("limit", [3000, 15_000])
def test_a_full_disk_is_the_users_to_mend_and_leaves_nothing(
    corpus: Path, tmp_path: Path, prepared: object, limit: int
) -> None:
    config, said = config_in(tmp_path, corpus), tmp_path / "said.txt"

    def run() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            prepare(config)
        except UserError as error:
            said.write_text(str(error))

    child = start(run)
    child.join(60)
    assert child.exitcode == 0
    assert "prepared data cannot be written: " in said.read_text()
    assert "$MOESCALE_CACHE" in said.read_text()
    assert [entry.name for entry in tmp_path.iterdir() if entry.is_dir()] == []
    assert prepare(config).train_tokens > 0
