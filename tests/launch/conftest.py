"""A small corpus, and the command line as a process of its own."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from moescale.launch import cli
from moescale.launch.environment import ALLOCATOR


class Ended(NamedTuple):
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus (this Python's argparse and typing modules) and ``base.yaml`` for tiny runs on it."""
    folder = tmp_path_factory.mktemp("launch")
    (folder / "corpus").mkdir()
    stdlib = Path(os.__file__).parent
    for name in ("argparse.py", "typing.py", "ast.py", "inspect.py"):
        (folder / "corpus" / name).write_text((stdlib / name).read_text(encoding="utf-8"), encoding="utf-8")
    (folder / "base.yaml").write_text(
        f"data:\n"
        f"  path: {folder / 'cache'}\n"
        f"  domains: {{python: {{files: ['{folder / 'corpus'}/*.py']}}}}\n"
        f"  tokenizer: {{vocab: 512}}\n"
        f"  held_out: 0.2\n"
        f"model: {{shape: d16}}\n"
        f"training: {{seq: 16, batch: 2}}\n"
        f"optimizer: {{lr: 0.01}}\n"
        f"eval: {{sequences: 4}}\n"
        f"logging: {{tensorboard: false}}\n"
        f"runtime: {{threads: 1}}\n"
    )
    return folder


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """One thread, and no launcher around us."""
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {**kept, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def moescale(environment: dict[str, str]) -> Command:
    """Call the command line to its end, as a process of its own."""

    def call(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "moescale", *(str(argument) for argument in arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, **options)  # type: ignore[call-overload, no-any-return]

    return call


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Call the command line in this process, for verbs that train nothing: imports are paid once."""
    for key, value in ALLOCATOR.items():
        monkeypatch.setenv(key, value)  # else it would replace this process

    def call(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["moescale", *(str(argument) for argument in arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capfd.readouterr()
        return Ended(int(ended.value.code or 0), printed.out, printed.err)

    return call


@pytest.fixture
def started(environment: dict[str, str]) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Start the command line and leave it running; what is left at the end is killed."""
    processes: list[subprocess.Popen[bytes]] = []

    def start(*arguments: object) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "moescale", *(str(argument) for argument in arguments)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()
