"""Surveyed domains to tokens: the tokenizer, then the training and held-out part of each domain.

Text is read again for each of the two and never held in memory.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..base.errors import UserError
from .config import DataConfig, DomainConfig
from .corpus import Document
from .indexed import SequenceWriter, open_indexed
from .survey import Survey, read_again
from .tokenizer import Tokenizer, train_tokenizer

TOKENIZER_BYTES = 64_000_000  # training text of a tokenizer; more changes little and costs memory
_TOGETHER = 8_000_000  # characters encoded at once, so that all cores have work
_Row = tuple[Document, bytes, bool]


def tokenizer_model(config: DataConfig, surveys: Mapping[str, Survey]) -> bytes:
    """The given sentencepiece model, or one trained on the training documents.

    Raises:
        UserError: the given model cannot be read, or the vocabulary does not fit the text.
    """
    if config.tokenizer.model is None:
        return train_tokenizer(_training_text(config, surveys), config.tokenizer.vocab)
    try:
        return Path(config.tokenizer.model).read_bytes()
    except OSError as error:
        raise UserError(f"data.tokenizer.model ({config.tokenizer.model}): cannot be read: {error.strerror}") from None


def _training_text(config: DataConfig, surveys: Mapping[str, Survey]) -> Iterator[str]:
    """Training documents; of a large corpus a random share, chosen by their hash."""
    total = sum(int(found.sizes[~found.held].sum()) for found in surveys.values())
    limit = min(TOKENIZER_BYTES / max(total, 1), 1.0) * 2**32
    for name, found in surveys.items():
        for document, digest, held in read_again(name, config.domains[name], found):
            # The hash's last bytes: its first ones decided what is held out.
            if not held and int.from_bytes(digest[-4:]) < limit:
                yield document.text


def encode_domain(name: str, domain: DomainConfig, found: Survey, tokenizer: Tokenizer, folder: Path) -> dict[str, Any]:
    """Write a text domain's two parts into ``folder``: a sequence for each document, ended by the eod token.

    Returns:
        What the manifest says of the domain.

    Raises:
        UserError: the tokenizer does not give the bytes of a document back.
    """
    training = SequenceWriter(folder / f"{name}.train", tokenizer)
    held_out = SequenceWriter(folder / f"{name}.held_out", tokenizer)
    for batch in _batches(read_again(name, domain, found)):
        encoded = tokenizer.encode_many([document.text for document, _, _ in batch])
        for (document, _, held), tokens in zip(batch, encoded, strict=True):
            _check_bytes(document, tokens, tokenizer)
            (held_out if held else training).add(tokens)
    entry: dict[str, Any] = {"indexed": None}
    for split, writer, chosen in (("train", training, ~found.held), ("held_out", held_out, found.held)):
        writer.finish()
        digests = [found.digests[row] for row in np.flatnonzero(chosen)]
        order = _order(split, digests, np.arange(writer.documents))
        entry[split] = _part(folder / f"{name}.{split}.npy", order, writer.tokens, found.sizes[chosen])
    return entry


def index_domain(name: str, domain: DomainConfig, found: Survey, folder: Path) -> dict[str, Any]:
    """Write into ``folder`` which sequences of an existing pair belong to each part; the pair stays where it is.

    Returns:
        What the manifest says of the domain.
    """
    assert domain.indexed is not None
    sequences = open_indexed(name, domain.indexed)
    entry: dict[str, Any] = {"indexed": str(Path(domain.indexed).resolve())}
    for split, chosen in (("train", ~found.held), ("held_out", found.held)):
        rows = np.flatnonzero(chosen)
        order = _order(split, [found.digests[row] for row in rows], rows)
        entry[split] = _part(
            folder / f"{name}.{split}.npy",
            order,
            int(sequences.sequence_lengths[rows].sum(dtype=np.int64)),
            found.sizes[chosen],
        )
    return entry


def _order(split: str, digests: list[bytes], rows: np.ndarray) -> np.ndarray:
    """Training documents as they come (every epoch shuffles them); held-out ones by hash, so that a few are fair."""
    if split == "held_out":
        rows = rows[sorted(range(len(rows)), key=digests.__getitem__)]
    return rows.astype(np.int32)


def _part(file: Path, order: np.ndarray, tokens: int, sizes: np.ndarray) -> dict[str, int] | None:
    if not order.size:
        return None
    np.save(file, order)
    return {"documents": len(order), "tokens": tokens, "bytes": int(sizes.sum())}


def _check_bytes(document: Document, tokens: np.ndarray, tokenizer: Tokenizer) -> None:
    """Bits per byte are right only if the tokens stand for exactly the document's bytes."""
    expected, found = len(document.text.encode()), int(tokenizer.piece_sizes[tokens].sum())
    if expected != found:
        raise UserError(
            f"data.tokenizer.model: its tokens for {document.origin} stand for {found} bytes instead of {expected}: "
            "the model normalises text, adds a leading space or has no byte fallback. Give one with "
            "normalization_rule_name identity, add_dummy_prefix false, remove_extra_whitespaces false and "
            "byte_fallback true, or leave data.tokenizer.model out to have one trained"
        )


def _batches(found: Iterable[_Row]) -> Iterator[list[_Row]]:
    batch: list[_Row] = []
    length = 0
    for row in found:
        batch.append(row)
        length += len(row[0].text)
        if length >= _TOGETHER:
            yield batch
            batch, length = [], 0
    if batch:
        yield batch
