"""One look at a domain: what its documents are and which of them are held out.

A document costs about 100 bytes of memory here, so beyond some ten million of them make indexed pairs with
Megatron's own tools and give less to one domain.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..base.errors import UserError
from .config import DomainConfig
from .corpus import Document, documents
from .indexed import open_indexed
from .split import held_out_documents
from .tokenizer import Tokenizer


@dataclass(frozen=True)
class Survey:
    """The documents of a domain in its order: a hash of each, its UTF-8 bytes, whether it is held out."""

    digests: list[bytes]
    sizes: np.ndarray
    held: np.ndarray

    def __str__(self) -> str:
        total, held = int(self.sizes.sum()), int(self.sizes[self.held].sum())
        return (
            f"{len(self.digests)} documents, {total / 1e6:.1f} MB; held out {int(self.held.sum())}, {held / 1e6:.2f} MB"
        )


def survey_text(name: str, domain: DomainConfig, share: float) -> Survey:
    """Read a text domain once and split it.

    Raises:
        UserError: it holds no text, or too few documents to hold any out.
    """
    digests, sizes = [], []
    for document in documents(name, domain):
        content = document.text.encode()
        digests.append(hashlib.sha256(content).digest())
        sizes.append(len(content))
    if not digests:
        raise UserError(f"data.domains.{name} ({_source(domain)}): every document is empty")
    return _split(name, domain, share, digests, np.array(sizes, dtype=np.int64))


def read_again(name: str, domain: DomainConfig, found: Survey) -> Iterator[tuple[Document, bytes, bool]]:
    """The documents of a surveyed text domain, each with its hash and whether it is held out.

    Raises:
        UserError: there are more or fewer than before.
    """
    try:
        yield from zip(documents(name, domain), found.digests, found.held.tolist(), strict=True)
    except ValueError:
        raise corpus_changed(name) from None


def corpus_changed(name: str) -> UserError:
    """Somebody writes into the corpus."""
    return UserError(f"data.domains.{name}: its files changed while they were read; start again when they are complete")


def survey_indexed(name: str, domain: DomainConfig, share: float, tokenizer: Tokenizer) -> Survey:
    """Read every sequence of an indexed pair and split them; sizes are the bytes that the tokens stand for.

    Raises:
        UserError: the pair is malformed, empty, or holds tokens beyond the tokenizer's vocabulary.
    """
    assert domain.indexed is not None
    sequences = open_indexed(name, domain.indexed)
    digests, sizes = [], []
    for number in range(len(sequences)):
        tokens = sequences.get(number)
        largest = int(tokens.max(initial=0))
        if largest >= tokenizer.vocab_size:
            raise UserError(
                f"data.domains.{name}.indexed ({domain.indexed}): sequence {number} holds token {largest}, but "
                f"data.tokenizer.model has {tokenizer.vocab_size} pieces; give the model these tokens were made with"
            )
        digests.append(hashlib.sha256(tokens.tobytes()).digest())
        sizes.append(int(tokenizer.piece_sizes[tokens].sum()))
    return _split(name, domain, share, digests, np.array(sizes, dtype=np.int64))


def _split(name: str, domain: DomainConfig, share: float, digests: list[bytes], sizes: np.ndarray) -> Survey:
    if domain.evaluate_only:
        return Survey(digests, sizes, np.ones(len(digests), dtype=bool))
    held = held_out_documents(digests, sizes, share)
    if share and not held.any():
        raise UserError(
            f"data.held_out ({share:g}): domain {name} ({_source(domain)}) has {len(set(digests))} distinct documents, "
            "too few to keep one whole for evaluation; split it into more documents (a line of .jsonl is one), or set "
            "data.held_out to 0 and add a domain with evaluate_only: true"
        )
    return Survey(digests, sizes, held)


def _source(domain: DomainConfig) -> str:
    return domain.source or domain.indexed or ", ".join(domain.packages or domain.files)
