"""Weights & Biases: a process of its own that reads the record and sends what it says.

    python -m moescale.training.wandb_follower RUN_FOLDER < /dev/null

The record is the truth and W&B a copy of it, so no network, no login and no fault of the client can stop or slow the
run, and a start that resumes sends what an earlier one could not. W&B takes a step once and in order: it says which
steps of this run it has, the follower sends the rest. Rows go out under the record's own step numbers.

Imports neither torch nor anything that does. By hand, as above, it sends the record of a run that has ended.
"""

import fcntl
import json
import os
import secrets
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..base.config import parse_yaml, validate
from ..base.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, UserError
from ..base.files import write_atomically
from ..scaling.record import RECORD
from .curves import curves
from .logging_config import WandbConfig

PATIENCE = 30.0  # seconds: for W&B to answer at first, and to take the rest when the run has ended
_TICK = 0.5  # seconds between looks at the record
_HAND_OVER = 4 * PATIENCE  # seconds for an earlier follower, whose run was killed, to end
_CODES = {"done": EXIT_DONE, "preempted": EXIT_STOPPED, "failed": EXIT_FAILED}


def require_wandb() -> None:
    """Raises a `UserError` where the client is not installed."""
    found = find_spec("wandb")
    if found is None or found.origin is None:  # W&B itself leaves folders of that name about
        raise UserError("logging.wandb: the package wandb is not installed; pip install 'moescale[wandb]'")


class Follower:
    """The process, seen from the run: started once the record has this attempt's header, and told when it is over."""

    def __init__(self, folder: Path):
        command = [sys.executable, "-m", "moescale.training.wandb_follower", str(folder)]
        # A session of its own: what asks the run to stop must not end it before it has sent the last lines.
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
        )

    def close(self) -> None:
        """The attempt is over, and its lines are in the record."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            _warn("did not take everything in time; the next start sends the rest")


def identity(folder: Path) -> str:
    """The id of the folder's run at W&B: made up once and kept in the folder, which may be moved or renamed."""
    path = folder / "logs" / "wandb" / "id"
    if not path.exists():
        write_atomically(path, secrets.token_hex(6) + "\n")
    return path.read_text().strip()


def follow(folder: Path, config: WandbConfig, content: dict[str, Any]) -> None:
    """Send the record in ``folder`` until its run is over; ``content`` is the run's configuration.

    Raises:
        Exception: the client's, when it cannot begin.
    """
    import wandb

    home = folder / "logs" / "wandb"
    run = wandb.init(
        project=config.project,
        entity=config.entity,
        group=config.group,
        id=identity(folder),
        name=content["name"],
        resume="allow",
        dir=home,
        config=content,
        settings=wandb.Settings(init_timeout=PATIENCE, console="off", silent=True),
    )
    if run.url:
        print(f"wandb: {run.url}", file=sys.stderr, flush=True)
    first, since, at = run.step, float("inf"), 0
    row: dict[str, float] = {}
    state = "failed"  # unless the record says how the attempt ended
    for line in _lines(folder / RECORD):
        kind = line["kind"]
        if kind == "header":
            state = "failed"
        elif kind == "end":
            state = line["state"]
        elif kind in ("step", "eval"):
            if line["step"] > at:  # so nothing more will come of the step before
                if row and at >= first:
                    run.log(row, step=at)
                row, at = {}, line["step"]
            if kind == "step":
                since += line["seconds"]
                if since < config.every and line["noise"] is None:
                    continue
                since = 0.0
            row |= {"tokens": line["tokens"], "flops": line["flops"], **curves(line)}
    if row and at >= first and state in ("done", "preempted"):
        run.log(row, step=at)  # else a later attempt comes to this step again, with all that belongs to it
    if state == "preempted":
        run.mark_preempting()
    run.finish(exit_code=_CODES[state])


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The record's whole lines as they are written, until standard input ends: whoever wrote them is gone."""
    with path.open("rb") as file:
        torn, over = b"", False
        while True:
            *whole, torn = (torn + file.read()).split(b"\n")
            yield from map(json.loads, whole)
            if over:
                return
            over = bool(select.select([sys.stdin], [], [], _TICK)[0])


def _only_one(folder: Path) -> bool:
    """Wait for the follower of an earlier attempt: W&B takes a run's steps from one writer. Whether it has ended."""
    path = folder / "logs" / "wandb" / ".lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)  # held until this process ends
    deadline = time.monotonic() + _HAND_OVER
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(_TICK)


def _warn(text: str) -> None:
    print(f"warning: logging.wandb: {text}", file=sys.stderr, flush=True)


def _settings(folder: Path) -> tuple[WandbConfig, dict[str, Any]]:
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(f"{folder}: no run here ({path.name} is missing)")
    content = parse_yaml(path.read_text(), str(path)) or {}
    given = (content.get("logging") or {}).get("wandb")
    if given is None:
        raise UserError(f"{path}: has no logging.wandb; add it, at least with its project")
    return validate(WandbConfig, given, f"{path}: logging.wandb"), content


def main() -> int:
    """Entry point of the process. It never fails: what is wrong is said, once."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    folder = Path(sys.argv[1])
    try:
        require_wandb()
        config, content = _settings(folder)
    except UserError as error:
        _warn(str(error))
        return EXIT_BAD_INPUT
    if not _only_one(folder):
        _warn("another process sends this run; the next start sends the rest")
        return EXIT_FAILED
    try:
        follow(folder, config, content)
    except Exception as error:
        _warn(f"{type(error).__name__}: {' '.join(str(error).split())}; the run goes on without it")
        sys.stderr.flush()
        os._exit(EXIT_FAILED)  # the client would otherwise try for another minute and a half
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
