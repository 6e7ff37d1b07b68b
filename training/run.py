"""One rank of a run, from its folder's state to an exit code. The folder is the run: start it again and it goes on."""

import fcntl
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml

from ..base.config import validate
from ..base.errors import EXIT_DONE, EXIT_FAILED, UserError
from ..base.files import write_atomically
from ..base.yaml_text import parse_yaml
from ..checkpoint.convert.start import check_start, is_converted
from ..compat.cuda_standin import install
from ..data import prepare
from ..parallel.launchers import Place, find_place
from ..parallel.roll_call import Arrival
from ..parallel.topology import Topology
from ..parallel.world import blame, leave, start
from .config import CONFIG, RunConfig
from .facts import facts
from .last_words import LastWords
from .status import LOCK, read_status
from .stop import StopRequest
from .wandb_follower import require_wandb


def train(config: RunConfig, folder: Path, *, quiet: bool = False) -> int:
    """Run this process's rank of ``config`` in ``folder``, resuming what is there.

    All ranks must see ``folder`` (a shared file system when they are on several hosts).

    Args:
        quiet: no progress line, even on a terminal.

    Returns:
        0 done; 75 stopped on request after a checkpoint; 1 failed, on another rank or by diverging (``status.json``
        says why).

    Raises:
        UserError: the configuration, the environment or the folder is wrong, or ranks differ in them; no result was
            changed.
        Exception: this rank failed; the other ranks know.
    """
    place = find_place()
    topology = config.check_layout(place.world, place.local_world)
    folder = folder.resolve()
    status = read_status(folder)
    if status is not None and status.state == "done":
        _check_folder(config, folder)
        return EXIT_DONE
    local_ranks = max(place.local_world, 1)
    torch.set_num_threads(config.runtime.threads or max(torch.get_num_threads() // local_ranks, 1))
    install()
    with ExitStack() as held:
        objection, shared = "", {}
        try:
            shared = _get_ready(config, folder, place, topology, held)
        except UserError as error:
            if place.world == 1:
                raise
            objection = str(error)  # raised on all ranks once they meet: the others would wait for this one
        return _attempt(config, folder, place, topology, shared, objection, quiet)


def _get_ready(config: RunConfig, folder: Path, place: Place, topology: Topology, held: ExitStack) -> dict[str, Any]:
    """Everything that needs no other rank; returns what must be the same on all of them."""
    if place.rank == 0:
        if config.logging.wandb is not None:
            require_wandb()
        held.enter_context(_locked(folder))
        _check_folder(config, folder)
        write_atomically(folder / CONFIG, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    return facts(config, topology, prepare(config.data)) if place.world > 1 else {}


def _attempt(
    config: RunConfig,
    folder: Path,
    place: Place,
    topology: Topology,
    shared: dict[str, Any],
    objection: str,
    quiet: bool,
) -> int:
    from .attempt import Attempt  # imports Megatron, so only now

    last_words = LastWords(folder, place.rank)
    try:
        start(place, config.runtime.timeout, Arrival(shared, objection), last_words.say)
        with StopRequest(folder) as stop:
            return Attempt(config, folder, topology, quiet=quiet).run(stop)
    except UserError as error:
        failure = blame(error)
        if place.world > 1 and not objection:  # torchrun hides the exit code; an objection may be to the folder
            last_words.write(failure)
        raise
    except BaseException as error:
        failure = blame(error)
        if failure.ranks == (place.rank,):
            last_words.write(failure)
            raise  # with the traceback, which leads to the fault
        last_words.say(failure)
        return EXIT_FAILED
    finally:
        leave()


def _check_folder(config: RunConfig, folder: Path) -> None:
    """Refuse a folder that holds another run."""
    path = folder / CONFIG
    if not path.exists():
        return
    content = parse_yaml(path.read_text(), str(path)) or {}
    if is_converted(content):
        check_start(content, folder, config.model, config.moe)
        return
    before = validate(RunConfig, content, str(path))
    if before.scientific_hash != config.scientific_hash:
        raise UserError(
            f"{folder} holds another run ({before.name}, scientific hash {before.scientific_hash}, this one's is "
            f"{config.scientific_hash}): choose another --out, or remove the folder"
        )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder, so that two processes never write one run. The system frees the lock of a killed process."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another process is running this run") from None
        yield
