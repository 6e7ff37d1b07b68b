"""A sentencepiece tokenizer that gives every text back exactly, byte for byte.

sentencepiece writes a space as U+2581 inside its pieces and reads that character back as a space. `Tokenizer`
spells U+2581 in the text with byte pieces and decodes by its own table, so it comes back like any other character.
The literal texts ``<unk>``, ``</s>`` and ``<0x41>`` are ordinary text. Only lone surrogates, which UTF-8 cannot
write, are refused.
"""

import hashlib
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import sentencepiece

from ..base.errors import UserError
from .config import DataConfig

SPACE = "\u2581"
_LONGEST = 1 << 20  # characters encoded at once: sentencepiece needs about 100 bytes of memory for each
_SENTENCE = 1000  # characters of a training sentence: long enough that line ends merge with what surrounds them


class Tokenizer:
    """Text to token ids and back.

    Args:
        model: content of a sentencepiece model file.
        origin: names the model in errors.

    Raises:
        UserError: not a sentencepiece model, or one without an end-of-sentence piece.
    """

    def __init__(self, model: bytes, origin: str = "tokenizer") -> None:
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.load_from_serialized_proto(model)
        except RuntimeError:
            raise UserError(f"{origin}: not a sentencepiece model") from None
        self.vocab_size: int = self._processor.vocab_size()
        self.eod: int = self._processor.eos_id()
        if self.eod < 0:
            raise UserError(f"{origin}: the model has no end-of-sentence piece, which ends each document")
        self.hash = hashlib.sha256(model).hexdigest()[:16]
        self._space = np.array([self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()], np.int32)

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Read a model file.

        Raises:
            UserError: missing, unreadable or not a model.
        """
        try:
            return cls(path.read_bytes(), str(path))
        except OSError as error:
            raise UserError(f"{path}: the tokenizer cannot be read: {error.strerror}") from None

    @property
    def unique_identifiers(self) -> dict[str, str]:
        """What Megatron's data sets name a tokenizer by."""
        return {"class": type(self).__name__, "hash": self.hash}

    @cached_property
    def pieces(self) -> list[bytes]:
        """[vocab_size] what each token stands for; control and unknown pieces stand for nothing."""
        return [self._bytes_of(token) for token in range(self.vocab_size)]

    @cached_property
    def piece_sizes(self) -> np.ndarray:
        """[vocab_size] int64, bytes that each token stands for."""
        return np.array([len(piece) for piece in self.pieces], dtype=np.int64)

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, without an end of document."""
        tokens: list[int] = self.encode_many([text])[0].tolist()
        return tokens

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids (int32) of each text; uses all cores."""
        parts = [list(_parts(text)) for text in texts]
        encoded = self._processor.encode([part for of_text in parts for part in of_text], return_type="numpy")
        whole, done = [], 0
        for of_text in parts:
            found = zip(of_text, encoded[done : done + len(of_text)], strict=True)
            whole.append(np.concatenate([self._space if part == SPACE else tokens for part, tokens in found]))
            done += len(of_text)
        return whole

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of ``tokens``; bytes that are not whole characters read as U+FFFD."""
        return b"".join(self.pieces[token] for token in tokens).decode(errors="replace")

    def _bytes_of(self, token: int) -> bytes:
        piece = self._processor.id_to_piece(token)
        if self._processor.is_byte(token):
            return bytes([int(piece[1:-1], 16)])
        if self._processor.is_control(token) or self._processor.is_unknown(token):
            return b""
        return bytes(piece.replace(SPACE, " ").encode())


def vocabulary_size(config: DataConfig) -> int:
    """Tokens in the vocabulary that ``config`` leads to, without preparing anything.

    Raises:
        UserError: the given tokenizer model cannot be read.
    """
    if config.tokenizer.model is None:
        return config.tokenizer.vocab
    return Tokenizer.load(Path(config.tokenizer.model)).vocab_size


def train_tokenizer(texts: Iterable[str], vocab: int) -> bytes:
    """Train byte-pair encoding (Sennrich et al. 2016) with byte fallback; the same texts give the same model.

    Args:
        texts: documents.
        vocab: pieces, of which 258 are the bytes, the unknown and the end of document.

    Returns:
        Content of a sentencepiece model file.

    Raises:
        UserError: the texts hold too little for so many pieces, or too many characters for so few.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(sentence for text in texts for sentence in _sentences(text)),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            add_dummy_prefix=False,
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            max_sentence_length=4 * _LONGEST,
            num_threads=1,  # written into the model file, so it must not depend on the machine
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = re.sub(r"^\w+: \S+ \[.*?\] ", "", str(error)).split(" Increase vocab_size")[0]
        raise UserError(f"data.tokenizer.vocab ({vocab}): does not fit this corpus: {reason}") from None
    return model.getvalue()


def _parts(text: str) -> Iterator[str]:
    """``text`` in parts that are encoded by themselves: around each U+2581, and no longer than `_LONGEST`."""
    for part in re.split(f"({SPACE})", text):
        start = 0
        while len(part) - start > _LONGEST:
            end = part.rfind("\n", start, start + _LONGEST) + 1 or start + _LONGEST
            yield part[start:end]
            start = end
        yield part[start:]


def _sentences(text: str) -> Iterator[str]:
    """Whole lines, about `_SENTENCE` characters together."""
    lines: list[str] = []
    length = 0
    for line in text.splitlines(keepends=True):
        if lines and length + len(line) > _SENTENCE:
            yield "".join(lines)
            lines, length = [], 0
        lines.append(line[:_LONGEST])
        length += len(line)
    if lines:
        yield "".join(lines)
