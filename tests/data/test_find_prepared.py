"""Looking for prepared data without preparing it."""

from pathlib import Path

import pytest

from moescale.base.config import validate
from moescale.data import DataConfig, find_prepared, prepare


def contents(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_finds_what_prepare_made_and_makes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, cache = tmp_path / "text", tmp_path / "cache"
    text.mkdir()
    for number in range(8):
        (text / f"{number}.txt").write_text(f"line {number} of a text that says little\n" * 40)
    keys = {"domains": {"mine": {"files": [f"{text}/*.txt"]}}, "tokenizer": {"vocab": 300}, "held_out": 0.2}
    config = validate(DataConfig, {"path": str(cache), **keys}, "test")
    assert find_prepared(config) is None
    assert not cache.exists()
    made = prepare(config)
    before = contents(cache)
    with monkeypatch.context() as patch:
        patch.setattr("hashlib.file_digest", _count(reads := []))
        found = find_prepared(config)
    assert found is not None
    assert (found.folder, found.train_tokens) == (made.folder, made.train_tokens)
    assert reads == [made.folder / "tokenizer.model"]
    assert find_prepared(config.model_copy(update={"held_out": 0.1})) is None
    assert contents(cache) == before

    (text / "8.txt").write_text("another text\n")
    assert find_prepared(config) is None
    (text / "8.txt").unlink()
    assert find_prepared(config) is not None
    for path in text.iterdir():
        path.unlink()
    assert find_prepared(config) is None  # the corpus is not here: no error, a plan may be made elsewhere


def _count(reads: list[Path]):
    import hashlib

    whole = hashlib.file_digest

    def read(file, name):
        reads.append(Path(file.name))
        return whole(file, name)

    return read
