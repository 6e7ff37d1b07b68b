"""Writing files so that nobody ever sees half of one, and hashing what they hold."""

import errno
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

# The disk's refusals, which no program can mend: full, over quota, file too large, read-only, broken.
_STORAGE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}


def is_storage_failure(error: BaseException) -> bool:
    """Whether the disk refused to write."""
    return isinstance(error, OSError) and error.errno in _STORAGE


def write_atomically(path: Path, content: str | bytes, *, durable: bool = True) -> None:
    """Write ``content`` beside ``path`` and rename it into place.

    Args:
        durable: also fsync the file and its folder, so that the file survives a power cut. Files that are
            rewritten every few steps (a status) leave this off.

    Raises:
        OSError: the disk is full or not writable; ``path`` is then as it was.
    """
    data = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.chmod(beside, 0o644)  # mkstemp makes private files; ours are read by other users of a cluster
        os.replace(beside, path)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise
    if durable:
        sync(path.parent)


def sync(path: Path) -> None:
    """Make a file's content, or the renames inside a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append_line(path: Path, content: Any) -> None:
    """Append ``content`` as a line of JSON, on the disk when this returns.

    Half a line that a killed process left stays, alone, for `read_lines` to pass over.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        whole = True
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            whole = file.read(1) == b"\n"
        file.write((b"" if whole else b"\n") + json.dumps(content).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of `append_line`; none if there is no file. What is not whole never happened."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    found = []
    for raw in content.split(b"\n"):
        try:
            line = json.loads(raw)
        except ValueError:
            continue
        if isinstance(line, dict):
            found.append(line)
    return found


def canonical_json(value: Any) -> str:
    """The one JSON text of ``value``: sorted keys, no spaces; the input of every hash we record."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: Any) -> str:
    """Sixteen hex digits naming a JSON value."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:16]
