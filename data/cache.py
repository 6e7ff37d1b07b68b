"""Where prepared data lives, who may write it, and how a damaged copy is noticed."""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..base.files import digest, sync, write_atomically

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"


class CorruptData(Exception):
    """A prepared folder that is not what its manifest says."""


def data_root(path: str | None) -> Path:
    """The folder that holds prepared data: ``path``, or ``data/`` in the user's cache.

    The cache is $MOESCALE_CACHE, else $XDG_CACHE_HOME/moescale, else ~/.cache/moescale.
    """
    if path is not None:
        return Path(path).expanduser()
    if own := os.environ.get("MOESCALE_CACHE"):
        return Path(own) / "data"
    shared = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(shared) / "moescale" / "data"


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file ``path``; the kernel releases it when its holder dies.

    Several hosts exclude each other where their shared file system passes flock on (NFS 4, Lustre mounted with
    ``flock``); elsewhere prepare the data once before they start.
    """
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("waiting for another process that prepares %s", path.stem)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def building(folder: Path) -> Iterator[Path]:
    """A fresh folder that becomes ``folder`` if the body ends well and leaves nothing behind if it does not.

    Call it under the lock: folders that a killed process left half-built are removed first.

    Raises:
        OSError: the disk is full or not writable.
    """
    prefix = f".{folder.name}.building-"
    for stale in folder.parent.glob(f"{prefix}*"):
        shutil.rmtree(stale, ignore_errors=True)
    beside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=prefix))
    try:
        beside.chmod(0o755)  # mkdtemp makes private folders; ours are read by other users of a cluster
        yield beside
        for file in beside.iterdir():
            sync(file)
        os.rename(beside, folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Write the manifest, with the size of every other file in ``folder`` and a digest of itself."""
    sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
    whole = {**content, "files": sizes}
    write_atomically(folder / MANIFEST, json.dumps({**whole, "digest": digest(whole)}, indent=2))


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read and check the manifest: its own digest, and name and size of every file.

    A changed byte inside a file of unchanged size goes unnoticed here; reading every byte at each start would cost
    more than preparing small corpora.

    Raises:
        CorruptData: what is wrong.
    """
    try:
        content: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        stated = content.pop("digest")
        sizes: dict[str, int] = content["files"]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CorruptData(f"{MANIFEST} cannot be read ({error!r})") from None
    if digest(content) != stated:
        raise CorruptData(f"{MANIFEST} does not match its digest")
    for name, size in sizes.items():
        file = folder / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            raise CorruptData(f"{name} has {'gone' if found is None else f'{found} bytes'} instead of {size} bytes")
    return content


def file_hash(path: Path) -> str:
    """Sixteen hex digits naming a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
