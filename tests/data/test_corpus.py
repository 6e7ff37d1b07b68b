import json
from pathlib import Path

import pytest

from moescale.base.config import load_yaml, validate
from moescale.base.errors import UserError
from moescale.data import DataConfig, DomainConfig
from moescale.data.corpus import documents, source_files

STDLIB = DomainConfig(source="stdlib")


def texts(folder: Path, pattern: str, **keys: str) -> list[str]:
    domain = DomainConfig(files=(str(folder / pattern),), **keys)
    return [document.text for document in documents("mine", domain)]


def test_stdlib_is_its_sources_and_topics_without_tests_and_packages() -> None:
    files = source_files("stdlib", STDLIB)
    assert files == source_files("stdlib", STDLIB)
    names = {path.name for path in files}
    assert {"argparse.py", "topics.py", "_pydecimal.py"} <= names
    assert not [path for path in files if {"test", "tests", "site-packages"} & set(path.parts[-4:])]
    assert not [name for name in names if name.startswith("_sysconfigdata")]
    found = list(documents("stdlib", STDLIB))
    assert 8e6 < sum(len(document.text) for document in found) < 20e6
    topics = [document for document in found if "topics.py:" in document.origin]
    assert len(topics) > 50
    assert any(document.text.startswith('The "assert" statement') for document in topics)


def test_packages_are_their_sources_without_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file, text in {
        "aa/__init__.py": "raise RuntimeError  # found, never imported",
        "aa/b/c.py": "two = 2",
        "aa/tests/test_c.py": "assert 0",
        "aa/data.txt": "no source",
        "zz.py": "a single file",
    }.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    found = [document.text for document in documents("mine", DomainConfig(packages=("aa", "aa")))]
    assert found == ["raise RuntimeError  # found, never imported", "two = 2"]
    for name, complaint in (("zz", "no folder"), ("aa.b", "the whole package, aa"), ("nowhere_at_all", "installed")):
        with pytest.raises(UserError, match=rf"data\.domains\.mine\.packages \({name}\).*{complaint}"):
            source_files("mine", DomainConfig(packages=("aa", name)))


def test_shipped_sections_are_valid() -> None:
    folder = Path(__file__).parents[2] / "configs" / "data"
    content = load_yaml(folder / "stdlib.yaml")
    assert validate(DataConfig, content["data"], "stdlib.yaml").domains == {"stdlib": STDLIB}
    content = load_yaml(folder / "packages.yaml")
    [domain] = validate(DataConfig, content["data"], "packages.yaml").domains.values()
    assert len(source_files("packages", domain)) > 4000


def test_files_come_sorted_once_and_byte_for_byte(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes("zwei\r\n\u2028".encode())
    (tmp_path / "a.txt").write_bytes(b"eins\0")
    (tmp_path / "empty.txt").touch()
    domain = DomainConfig(files=(str(tmp_path / "*.txt"), str(tmp_path / "b*")))
    assert [document.text for document in documents("mine", domain)] == ["eins\0", "zwei\r\n\u2028"]


def test_jsonl_gives_a_document_for_each_line(tmp_path: Path) -> None:
    rows = [{"text": "one\ntwo"}, {"text": ""}, {"text": "\u2581"}]
    (tmp_path / "x.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows))
    assert texts(tmp_path, "x.jsonl") == ["one\ntwo", "\u2581"]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"body": "x"}', "no text under text_key 'text' (found: body)"),
        ('{"text": 3}', "no text under text_key 'text'"),
        ('["text"]', "found: list"),
        ('{"text": ', "not a JSON object"),
        ('{"text": "\\ud800"}', "surrogate"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, complaint: str) -> None:
    (tmp_path / "x.jsonl").write_text(f'{{"text": "fine"}}\n\n{line}\n')
    with pytest.raises(UserError) as error:
        texts(tmp_path, "*.jsonl")
    assert str(error.value).startswith(f"{tmp_path / 'x.jsonl'}:3: ")
    assert complaint in str(error.value)


def test_missing_files_and_foreign_encodings_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.domains\.mine\.files \(.*nothing\*\.txt\): no file matches"):
        texts(tmp_path, "nothing*.txt")
    (tmp_path / "latin.txt").write_bytes("né".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.txt: not UTF-8 text \(byte 1\)"):
        texts(tmp_path, "latin.txt")
    with pytest.raises(UserError, match=r"data\.domains\.mine\.indexed .*pair\.bin does not exist"):
        source_files("mine", DomainConfig(indexed=str(tmp_path / "pair")))
