"""One rank of a run, from its folder's state to an exit code. The folder is the run: start it again and it goes on."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import yaml

from ..base.config import parse_yaml, validate
from ..base.errors import EXIT_DONE, UserError
from ..base.files import write_atomically
from ..compat.cuda_standin import install
from ..parallel.topology import Topology
from ..parallel.world import Place, leave, start
from ..scaling.record import RECORD, read_record
from .config import RunConfig
from .status import LOCK, read_status, write_status
from .stop import StopRequest
from .trunk import CONFIG


def train(config: RunConfig, folder: Path, *, quiet: bool = False) -> int:
    """Run this process's rank of ``config`` in ``folder``, resuming what is there.

    All ranks must see ``folder`` (a shared file system when they are on several hosts).

    Args:
        quiet: no progress line, even on a terminal.

    Returns:
        0 done; 75 stopped on request after a checkpoint; 1 failed (``status.json`` says why).

    Raises:
        UserError: the configuration, the environment or the folder is wrong; nothing was changed.
    """
    place = Place.from_environment()
    topology = config.check_layout(place.world, place.local_world)
    folder = folder.resolve()
    _check_folder(config, folder)
    status = read_status(folder)
    if status is not None and status.state == "done":
        return EXIT_DONE
    if place.rank != 0:
        return _attempt(config, folder, place, topology, quiet)
    with _locked(folder):
        write_atomically(folder / CONFIG, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
        return _attempt(config, folder, place, topology, quiet)


def _attempt(config: RunConfig, folder: Path, place: Place, topology: Topology, quiet: bool) -> int:
    local_ranks = max(place.local_world, 1)
    torch.set_num_threads(config.runtime.threads or max(torch.get_num_threads() // local_ranks, 1))
    install()
    from .attempt import Attempt  # imports Megatron, so only now

    start(place, config.runtime.timeout)
    try:
        with StopRequest(folder) as stop:
            return Attempt(config, folder, topology, quiet=quiet).run(stop)
    except UserError:
        raise
    except Exception as error:
        if place.rank == 0:
            _tell_failure(folder, error)
        raise
    finally:
        leave()


def _tell_failure(folder: Path, error: Exception) -> None:
    """Write the reason into the status, unless the disk that failed the run refuses that too."""
    before = read_status(folder)
    steps = read_record(folder).steps if (folder / RECORD).exists() else []
    with suppress(OSError):
        write_status(
            folder,
            "failed",
            reason=f"{type(error).__name__}: {error}",
            step=steps[-1]["step"] if steps else 0,
            steps_total=before.steps_total if before else 0,
            attempt=before.attempt if before else 1,
        )


def _check_folder(config: RunConfig, folder: Path) -> None:
    """Refuse a folder that holds another run."""
    path = folder / CONFIG
    if not path.exists():
        return
    before = validate(RunConfig, parse_yaml(path.read_text(), str(path)) or {}, str(path))
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
