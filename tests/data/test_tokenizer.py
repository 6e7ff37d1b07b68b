from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from moescale.base.errors import UserError
from moescale.data import DataConfig, DomainConfig, PreparedData, Tokenizer, TokenizerConfig, vocabulary_size
from moescale.data.tokenizer import _LONGEST, train_tokenizer

AWKWARD = [
    "\u2581",
    "\0",
    "<unk>",
    "</s>",
    "<0x41>",
    " ",
    "\n",
    "\r\n",
    "\u2047",
    "\ufeff",
    "\U0010ffff",
    "e\u0301",
    "token",
]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(AWKWARD) | st.text(), max_size=20).map("".join))
def test_every_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert tokenizer.piece_sizes[tokens].sum() == len(text.encode())
    assert tokenizer.eod not in tokens


def test_pieces_hold_line_ends_and_indentation() -> None:
    tokenizer = Tokenizer(train_tokenizer(["    if x:\n        return x\n" * 50], 290))
    assert tokenizer.vocab_size == 290
    assert [piece for piece in tokenizer.pieces if piece.endswith(b"\n") and len(piece) > 1]
    assert [piece for piece in tokenizer.pieces if len(piece) > 1 and not piece.strip(b" ")]


@pytest.mark.parametrize("unit", ["experts and gates\n", "\u4e16", "x"])
def test_a_text_longer_than_one_part_comes_back(tokenizer: Tokenizer, unit: str) -> None:
    text = unit * (_LONGEST // len(unit) + 5)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_many_texts_at_once_are_as_one_by_one(tokenizer: Tokenizer, paragraphs: list[str]) -> None:
    texts = ["", "one", "a\u2581b\u2581", paragraphs[0]]
    assert [tokens.tolist() for tokens in tokenizer.encode_many(texts)] == [tokenizer.encode(text) for text in texts]


def test_training_is_deterministic(tokenizer: Tokenizer, paragraphs: list[str]) -> None:
    model = train_tokenizer(paragraphs, 340)
    assert Tokenizer(model).hash == tokenizer.hash
    assert train_tokenizer(paragraphs[1:], 340) != model


def test_a_vocabulary_that_does_not_fit_is_refused(paragraphs: list[str]) -> None:
    with pytest.raises(
        UserError, match=r"data\.tokenizer\.vocab \(60000\): does not fit this corpus: Vocabulary size too"
    ):
        train_tokenizer(paragraphs, 60_000)


def test_vocabulary_is_known_before_anything_is_prepared(tmp_path: Path, prepared: PreparedData) -> None:
    domains = {"mine": DomainConfig(files=("nowhere/*.txt",))}
    assert vocabulary_size(DataConfig(domains=domains, tokenizer=TokenizerConfig(vocab=512))) == 512
    given_model = TokenizerConfig(model=str(prepared.folder / "tokenizer.model"))
    assert vocabulary_size(DataConfig(domains=domains, tokenizer=given_model)) == 340
    missing = TokenizerConfig(model=str(tmp_path / "none.model"))
    with pytest.raises(UserError, match=r"none\.model: the tokenizer cannot be read"):
        vocabulary_size(DataConfig(domains=domains, tokenizer=missing))


@pytest.mark.parametrize("content", [b"", b"not a model"])
def test_what_is_no_model_is_refused(content: bytes) -> None:
    with pytest.raises(UserError, match=r"mine: (not a sentencepiece model|the model has no)"):
        Tokenizer(content, "mine")


def test_a_model_without_an_end_piece_is_refused(tmp_path: Path, paragraphs: list[str]) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(paragraphs), model_prefix=str(tmp_path / "m"), vocab_size=60, eos_id=-1, minloglevel=2
    )
    with pytest.raises(UserError, match="no end-of-sentence piece"):
        Tokenizer.load(tmp_path / "m.model")
