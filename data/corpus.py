"""The documents of a domain, in an order that does not depend on the machine.

A text file is one document; so is each line of a ``.jsonl`` file. The built-in ``stdlib`` is what every Python has:
the sources of its standard library without tests, and the texts behind ``help()``; 11.8 MB in Python 3.11. The sources
of installed packages, again without tests, are ten times that and need no download either.
"""

import glob
import importlib.util
import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..base.errors import UserError
from .config import DomainConfig

# Tests are missing from some distributions of Python, packages are not its own, and what its build wrote
# (_sysconfigdata_*, config-*) holds the paths of one machine.
_LEFT_OUT_FOLDERS = ("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__")
_LEFT_OUT_PREFIXES = ("_sysconfigdata", "config-")


@dataclass(frozen=True)
class Document:
    """One text and where it came from (``file`` or ``file:line``)."""

    text: str
    origin: str


def source_files(name: str, domain: DomainConfig) -> list[Path]:
    """Every file that the domain ``name`` is made of, sorted, each once.

    Raises:
        UserError: a glob matches no file, or half of an indexed pair is missing.
    """
    if domain.source == "stdlib":
        return _stdlib_files()
    if domain.packages:
        return [path for package in sorted(set(domain.packages)) for path in _package_files(name, package)]
    if domain.indexed is not None:
        return _indexed_files(name, domain.indexed)
    found: set[str] = set()
    for pattern in domain.files:
        matches = [path for path in glob.glob(os.path.expanduser(pattern), recursive=True) if os.path.isfile(path)]
        if not matches:
            raise UserError(f"data.domains.{name}.files ({pattern}): no file matches in {Path.cwd()}")
        found.update(matches)
    return [Path(path) for path in sorted(found)]


def documents(name: str, domain: DomainConfig) -> Iterator[Document]:
    """The non-empty documents of a text domain, in the order of `source_files`.

    Raises:
        UserError: a file cannot be read, is not UTF-8, or a line of JSONL has no text; names file and line.
    """
    for path in source_files(name, domain):
        if domain.source == "stdlib":
            found = _stdlib_documents(path)
        elif domain.packages:
            found = _source_document(path)
        elif path.suffix == ".jsonl":
            found = _json_documents(path, domain.text_key)
        else:
            found = _text_document(path)
        yield from (document for document in found if document.text)


def _stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    found = _python_files(root)
    if not found:
        raise UserError(f"data: source stdlib: no Python sources in {root}; give files of your own")
    return found


def _package_files(name: str, package: str) -> list[Path]:
    """The sources of an installed package, which is found but not imported."""
    where = f"data.domains.{name}.packages ({package})"
    if "." in package:
        raise UserError(f"{where}: give the whole package, {package.partition('.')[0]}")
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        raise UserError(f"{where}: no such package is installed in {sysconfig.get_path('purelib')}; pip install it")
    found = [path for root in spec.submodule_search_locations or () for path in _python_files(Path(root))]
    if not found:
        raise UserError(f"{where}: no folder of Python sources; give a package that has one")
    return found


def _python_files(root: Path) -> list[Path]:
    """Python's own order of folders differs between machines; that of names does not."""
    found = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [sub for sub in subfolders if not _is_left_out(sub)]
        found += [Path(folder, file) for file in files if file.endswith(".py") and not _is_left_out(file)]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _is_left_out(name: str) -> bool:
    return name in _LEFT_OUT_FOLDERS or name.startswith(_LEFT_OUT_PREFIXES)


def _stdlib_documents(path: Path) -> Iterator[Document]:
    if path.parts[-2:] == ("pydoc_data", "topics.py"):
        from pydoc_data.topics import topics

        # The file is one big literal of these texts, so they stand for it.
        for topic in sorted(topics):
            yield Document(topics[topic], f"{path}:{topic}")
        return
    yield from _source_document(path)


def _source_document(path: Path) -> Iterator[Document]:
    try:
        yield Document(_read(path).decode(), str(path))
    except UnicodeDecodeError:
        return  # sources may declare another encoding; the same files are skipped everywhere


def _indexed_files(name: str, prefix: str) -> list[Path]:
    files = [Path(f"{prefix}.bin"), Path(f"{prefix}.idx")]
    for file in files:
        if not file.is_file():
            raise UserError(f"data.domains.{name}.indexed ({prefix}): {file} does not exist; give the pair's prefix")
    return files


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _text_document(path: Path) -> Iterator[Document]:
    try:
        yield Document(_read(path).decode(), str(path))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); convert it or leave it out") from None


def _json_documents(path: Path, key: str) -> Iterator[Document]:
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield Document(_text_of(line, key, f"{path}:{number}"), f"{path}:{number}")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _text_of(line: bytes, key: str, origin: str) -> str:
    try:
        content = json.loads(line)
    except ValueError as error:
        raise UserError(f"{origin}: not a JSON object: {error}") from None
    text = content.get(key) if isinstance(content, dict) else None
    if not isinstance(text, str):
        keys = ", ".join(sorted(content)) if isinstance(content, dict) else type(content).__name__
        raise UserError(f"{origin}: no text under text_key {key!r} (found: {keys or 'nothing'})")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{origin}: the text holds half of a surrogate pair, which is no Unicode text") from None
    return text
