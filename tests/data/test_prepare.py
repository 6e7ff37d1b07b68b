import json
import logging
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from moescale.base.config import validate
from moescale.base.errors import UserError
from moescale.data import DataConfig, DomainConfig, PreparedData, TokenizerConfig, prepare
from moescale.data.cache import data_root
from moescale.data.corpus import documents
from moescale.data.indexed import SequenceWriter, open_indexed


def small(path: Path, pattern: str, **keys: object) -> DataConfig:
    """One domain of text files."""
    content = {
        "path": str(path),
        "domains": {"mine": {"files": [pattern]}},
        "tokenizer": {"vocab": 330},
        "held_out": 0.2,
    }
    return validate(DataConfig, content | keys, "test")


def texts_of(prepared: PreparedData, domain: str, split: str) -> list[str]:
    """The documents of a part, decoded, in its order."""
    part = prepared.part(domain, split)
    assert part is not None
    sequences = open_indexed(domain, part.prefix)
    found = [sequences.get(row).tolist() for row in part.order]
    assert all(tokens.count(prepared.tokenizer.eod) == 1 and tokens[-1] == prepared.tokenizer.eod for tokens in found)
    return [prepared.tokenizer.decode(tokens) for tokens in found]


def test_every_document_is_in_one_part_unchanged(prepared: PreparedData, data_config: DataConfig) -> None:
    for name, domain in data_config.domains.items():
        expected = [document.text for document in documents(name, domain)]
        held_out = texts_of(prepared, name, "held_out")
        training = [] if domain.evaluate_only else texts_of(prepared, name, "train")
        assert held_out
        assert sorted(training + held_out) == sorted(expected)
        assert training == [text for text in expected if text in set(training)]
    assert prepared.part("apart", "train") is None


def test_manifest_counts_what_is_there(prepared: PreparedData) -> None:
    manifest = json.loads((prepared.folder / "manifest.json").read_text())
    assert manifest["hash"] == prepared.data_hash == prepared.folder.name
    assert manifest["tokenizer"] == {"hash": prepared.tokenizer.hash, "vocab_size": prepared.vocab_size}
    total = 0
    for name, entry in manifest["domains"].items():
        for split in ("train", "held_out"):
            part = prepared.part(name, split)
            if part is None:
                continue
            texts = texts_of(prepared, name, split)
            assert part.bytes == entry[split]["bytes"] == sum(len(text.encode()) for text in texts)
            assert part.tokens == sum(len(prepared.tokenizer.encode(text)) + 1 for text in texts)
            assert len(part.order) == entry[split]["documents"] == len(texts)
            total += part.tokens if split == "train" else 0
    assert prepared.train_tokens == total


def test_it_is_found_again_without_being_touched(prepared: PreparedData, data_config: DataConfig) -> None:
    before = {file: file.stat().st_mtime_ns for file in prepared.folder.iterdir()}
    order_only = data_config.model_copy(update={"samples": 7, "weights": {}})
    for config in (data_config, order_only):
        assert prepare(config).folder == prepared.folder
    assert {file: file.stat().st_mtime_ns for file in prepared.folder.iterdir()} == before


def test_the_same_content_has_the_same_hash_anywhere(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    for file in corpus.glob("0*.txt"):
        (tmp_path / "copy" / file.name).write_bytes(file.read_bytes())
    here = prepare(small(tmp_path / "x", f"{corpus}/0*.txt"))
    there = prepare(small(tmp_path / "y", f"{tmp_path}/copy/*.txt"))
    assert here.manifest == there.manifest
    for file in here.folder.iterdir():
        assert file.read_bytes() == (there.folder / file.name).read_bytes(), file.name
    with (tmp_path / "copy" / "00.txt").open("a") as file:
        file.write("more\n")
    assert prepare(small(tmp_path / "y", f"{tmp_path}/copy/*.txt")).data_hash != there.data_hash
    assert prepare(small(tmp_path / "y", f"{corpus}/0*.txt", held_out=0.3)).data_hash != there.data_hash


@pytest.mark.parametrize("damage", ["truncated", "missing", "manifest", "no manifest", "tokenizer"])
def test_a_damaged_copy_is_reported_and_built_again(
    corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    config = small(tmp_path, f"{corpus}/0*.txt")
    folder = prepare(config).folder
    whole = {file.name: file.read_bytes() for file in folder.iterdir()}
    if damage == "truncated":
        (folder / "mine.train.bin").write_bytes(whole["mine.train.bin"][:-2])
    elif damage == "missing":
        (folder / "mine.held_out.idx").unlink()
    elif damage == "manifest":
        (folder / "manifest.json").write_bytes(
            whole["manifest.json"].replace(b'"train_tokens": ', b'"train_tokens": 1')
        )
    elif damage == "no manifest":
        (folder / "manifest.json").unlink()
    else:
        (folder / "tokenizer.model").write_bytes(whole["tokenizer.model"][:-1] + b"\xff")
    with caplog.at_level(logging.WARNING):
        again = prepare(config)
    assert f"{folder} is damaged" in caplog.text
    assert {file.name: file.read_bytes() for file in again.folder.iterdir()} == whole


def test_a_corpus_with_nothing_to_split_or_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("a single document\n" * 30)
    (tmp_path / "empty.txt").touch()
    with pytest.raises(UserError, match=r"data\.domains\.mine \(.*empty\*\): every document is empty"):
        prepare(small(tmp_path / "p", f"{tmp_path}/empty*"))
    with pytest.raises(UserError, match=r"data\.held_out \(0\.2\): domain mine .* has 1 distinct documents"):
        prepare(small(tmp_path / "p", f"{tmp_path}/*.txt"))
    with pytest.raises(UserError, match=r"data\.domains\.mine\.files \(.*none\*\): no file matches"):
        prepare(small(tmp_path / "p", f"{tmp_path}/none*"))
    assert not [entry for entry in (tmp_path / "p").iterdir() if entry.is_dir()]
    whole = prepare(small(tmp_path / "p", f"{tmp_path}/*.txt", held_out=0, tokenizer={"vocab": 300}))
    assert whole.part("mine", "held_out") is None


def test_an_indexed_pair_is_used_where_it_is(prepared: PreparedData, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    writer = SequenceWriter(tmp_path / "given", prepared.tokenizer)
    written = [rng.integers(2, prepared.vocab_size, rng.integers(5, 60)).astype(np.int32) for _ in range(50)]
    for tokens in written:
        writer.add(tokens)
    writer.finish()
    content = {
        "path": str(tmp_path / "p"),
        "domains": {"mine": {"indexed": str(tmp_path / "given")}},
        "tokenizer": {"model": str(prepared.folder / "tokenizer.model")},
        "held_out": 0.1,
    }
    found = prepare(validate(DataConfig, content, "test"))
    assert not list(found.folder.glob("*.bin"))
    parts = [found.part("mine", "train"), found.part("mine", "held_out")]
    assert sorted(np.concatenate([part.order for part in parts])) == list(range(50))
    for part in parts:
        assert part.tokens == sum(len(written[row]) + 1 for row in part.order)
        assert part.bytes == sum(int(found.tokenizer.piece_sizes[written[row]].sum()) for row in part.order)
    assert 1 <= len(parts[1].order) <= 12
    (tmp_path / "given.bin").write_bytes((tmp_path / "given.bin").read_bytes()[:-10])
    with pytest.raises(UserError, match=r"data\.domains\.mine\.indexed .*it was cut off"):
        prepare(validate(DataConfig, content, "test"))


def test_indexed_tokens_must_fit_the_tokenizer(prepared: PreparedData, tmp_path: Path) -> None:
    writer = SequenceWriter(tmp_path / "given", prepared.tokenizer)
    writer.add(np.array([5, 340], dtype=np.int32))
    writer.finish()
    model = {"model": str(prepared.folder / "tokenizer.model")}
    content = {"path": str(tmp_path / "p"), "domains": {"mine": {"indexed": str(tmp_path / "given")}}}
    with pytest.raises(UserError, match=r"data\.domains\.mine\.indexed \(.*given\): give data\.tokenizer\.model"):
        validate(DataConfig, content, "test")
    with pytest.raises(UserError, match=r"sequence 0 holds token 340, but data\.tokenizer\.model has 340"):
        prepare(validate(DataConfig, content | {"tokenizer": model}, "test"))
    index = (tmp_path / "given.idx").read_bytes()
    for content_of_index in (b"something else entirely, and long enough", index[:-1], index[:20]):
        (tmp_path / "given.idx").write_bytes(content_of_index)
        with pytest.raises(UserError, match=r"given\.idx is not a whole index"):
            prepare(validate(DataConfig, content | {"tokenizer": model}, "test"))


def test_a_given_model_must_give_bytes_back(prepared: PreparedData, corpus: Path, tmp_path: Path) -> None:
    given = {"model": str(prepared.folder / "tokenizer.model")}
    found = prepare(small(tmp_path, f"{corpus}/1*.txt", tokenizer=given))
    assert found.tokenizer_hash == prepared.tokenizer_hash
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([(corpus / "00.txt").read_text()]),
        model_prefix=str(tmp_path / "usual"),
        vocab_size=40,
        minloglevel=2,
        max_sentence_length=100_000,
    )
    with pytest.raises(
        UserError, match=r"data\.tokenizer\.model: its tokens for .*10\.txt stand for \d+ bytes instead of"
    ):
        prepare(small(tmp_path, f"{corpus}/1*.txt", tokenizer={"model": str(tmp_path / "usual.model")}))


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOESCALE_CACHE", "/own")
    assert data_root(None) == Path("/own/data")
    monkeypatch.delenv("MOESCALE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert data_root(None) == Path("/xdg/moescale/data")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert data_root(None) == Path.home() / ".cache" / "moescale" / "data"
    assert data_root("/given") == Path("/given")


def test_names_and_weights_are_checked() -> None:
    files = DomainConfig(files=("x",))
    with pytest.raises(ValueError, match=r"data\.domains\.a/b: names files"):
        DataConfig(domains={"a/b": files})
    with pytest.raises(ValueError, match=r"data\.weights: at least one must be above 0"):
        DataConfig(domains={"a": files}, weights={"a": 0.0}, tokenizer=TokenizerConfig())
