"""A small corpus of made-up sentences, and what was prepared from it."""

import json
import random
from pathlib import Path

import pytest

from moescale.data import DataConfig, DomainConfig, PreparedData, Tokenizer, TokenizerConfig, prepare
from moescale.data.tokenizer import train_tokenizer

WORDS = (
    "a",
    "gate",
    "sends",
    "each",
    "token",
    "to",
    "two",
    "experts",
    "and",
    "router",
    "learns",
    "which",
    "were",
    "right",
)


def sentences(seed: int, words: int) -> str:
    """Lines of words, indented here and there, with a character that needs byte pieces."""
    draw = random.Random(seed)
    lines, left = [], words
    while left > 0:
        length = min(draw.randint(3, 12), left)
        line = " ".join(draw.choice(WORDS) for _ in range(length))
        lines.append("    " * draw.randint(0, 2) + line.capitalize() + draw.choice([".", "?", " \u2581é", "\t\u4e16"]))
        left -= length
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 text files, and a .jsonl file of 40 lines."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(60):
        (folder / f"{number:02}.txt").write_text(sentences(number, 40 + 10 * (number % 7)))
    rows = [json.dumps({"body": sentences(1000 + number, 60), "id": number}) for number in range(40)]
    (folder / "rows.jsonl").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="session")
def data_config(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Two weighted domains that are trained on and one that is only evaluated on."""
    return DataConfig(
        path=str(tmp_path_factory.mktemp("prepared")),
        domains={
            "files": DomainConfig(files=(str(corpus / "[0-4]*.txt"),)),
            "rows": DomainConfig(files=(str(corpus / "*.jsonl"),), text_key="body"),
            "apart": DomainConfig(files=(str(corpus / "5*.txt"),), evaluate_only=True),
        },
        weights={"files": 3.0, "rows": 1.0},
        samples=2000,
        tokenizer=TokenizerConfig(vocab=340),
        held_out=0.1,
    )


@pytest.fixture(scope="session")
def prepared(data_config: DataConfig) -> PreparedData:
    return prepare(data_config)


@pytest.fixture(scope="session")
def paragraphs() -> list[str]:
    """Text to train a tokenizer on."""
    return [sentences(seed, 300) for seed in range(10)]


@pytest.fixture(scope="session")
def tokenizer(paragraphs: list[str]) -> Tokenizer:
    return Tokenizer(train_tokenizer(paragraphs, 340))
