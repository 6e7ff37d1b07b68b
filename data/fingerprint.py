"""What a file holds, told by its hash; a file that did not change is not read again."""

import contextlib
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from ..base.errors import UserError
from ..base.files import write_atomically


class UnknownFile(Exception):
    """A file whose hash is not remembered, where reading it was not allowed."""


class Fingerprints:
    """SHA-256 of files, remembered in one JSON file by path, size and modification time.

    The first look costs one read of every byte (about 1 GB/s), later ones a stat each. A file that is rewritten at
    equal size with its old time stamp set back passes for unchanged, as it does for make and rsync.

    Args:
        store: the JSON file.
        remembered_only: read no file and write nothing.
    """

    def __init__(self, store: Path, *, remembered_only: bool = False) -> None:
        self._store = store
        self._remembered_only = remembered_only
        self._news = False
        self._known: dict[str, list[object]] = {}
        with contextlib.suppress(OSError, ValueError, TypeError):  # absent or damaged: every file is read once more
            self._known = dict(json.loads(store.read_text()))

    def of(self, paths: Iterable[Path]) -> list[str]:
        """The hashes of ``paths``, in their order.

        Raises:
            UserError: a file cannot be read.
            UnknownFile: ``remembered_only``, and a file is new or has changed.
        """
        hashes = [self._look(path) for path in paths]
        if self._news:
            self._remember()
        return hashes

    def _look(self, path: Path) -> str:
        key = str(path.absolute())
        try:
            status = path.stat()
            seen = self._known.get(key)
            if seen is not None and seen[:2] == [status.st_size, status.st_mtime_ns]:
                return str(seen[2])
            if self._remembered_only:
                raise UnknownFile(key)
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None
        self._known[key] = [status.st_size, status.st_mtime_ns, content]
        self._news = True
        return content

    def _remember(self) -> None:
        # A store that cannot be written (a shared read-only folder, a full disk) costs time, not correctness.
        with contextlib.suppress(OSError):
            write_atomically(self._store, json.dumps(self._known), durable=False)
        self._news = False
