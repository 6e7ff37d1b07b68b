"""Which code a process runs, told without importing any of it."""

import hashlib
from importlib.metadata import version
from pathlib import Path

from ..version import __version__

ROOT = Path(__file__).parent.parent
_LIBRARIES = ("torch", "deepspeed", "megatron-core")


def source_digest() -> str:
    """Sixteen hex digits naming the package's Python files, by path and content.

    Two checkouts of one version number are told apart.
    """
    found = hashlib.sha256()
    packages = sorted(folder for folder in ROOT.iterdir() if (folder / "__init__.py").is_file())
    for package in packages:
        for path in sorted(package.rglob("*.py")):
            found.update(f"{path.relative_to(ROOT)}\0".encode())
            found.update(path.read_bytes())
    return found.hexdigest()[:16]


def versions() -> dict[str, str]:
    """Versions of this package and of the libraries that decide what is computed."""
    return {
        "version of moescale": __version__,
        "source code of moescale": source_digest(),
        **{f"version of {name}": version(name) for name in _LIBRARIES},
    }
