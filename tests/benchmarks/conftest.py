"""Real text that is prepared within a second or two: this package's own sources."""

from pathlib import Path

import pytest

import moescale
from moescale.data import DataConfig, DomainConfig


@pytest.fixture(scope="session")
def own_sources(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    root = Path(moescale.__file__).parent
    files = tuple(f"{root}/{folder}/*.py" for folder in ("data", "models", "scaling", "training", "launch"))
    path = tmp_path_factory.mktemp("prepared")
    return DataConfig(path=str(path), domains={"sources": DomainConfig(files=files)}, samples=4000)
