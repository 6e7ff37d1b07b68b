"""Questions made of held-out text: a context, the passage that follows it, and passages from elsewhere.

A passage starts where a word ends: with a space that follows something else. So a context never ends in white space, no
piece of our tokenizers reaches from a context into a choice, and a choice's first character gives nothing away.
"""

import re
from functools import lru_cache

import numpy as np

from ..base.errors import UserError
from .indexed import open_indexed
from .prepare import Part, PreparedData
from .questions import Question
from .task_config import ContinuationsConfig
from .tokenizer import SPACE, Tokenizer

_TRIES = 100  # draws for each passage wanted, after which a domain counts as too small
_CACHED = 64  # documents kept as text
# Characters that do not survive the way to text and, in transformers' form of our tokenizer, back to tokens.
_UNFIT = re.compile(f"[\N{REPLACEMENT CHARACTER}{SPACE}]")
_START = re.compile(r"(?<=\S) ")


def continuations(name: str, config: ContinuationsConfig, prepared: PreparedData) -> list[Question]:
    """``config.count`` questions over a domain's held-out documents, the same for the same data and seed.

    The wrong choices of a question continue contexts that nobody asks about: passages like the right one. No passage is
    a choice twice.

    Raises:
        UserError: the domain holds too little text out.
    """
    wanted = config.count * config.choices
    rng = np.random.default_rng(config.seed)
    found: dict[str, str] = {}  # passage -> the context that it continues
    if (part := prepared.held_out(config.domain)) is not None:
        draws = _Draws(config, part, prepared.tokenizer, rng)
        for _ in range(_TRIES * wanted):
            if (drawn := draws.one()) is not None:
                context, passage = drawn
                found.setdefault(passage, context)
            if len(found) == wanted:
                rows = list(found.items())
                return [_question(rows[first :: config.count], rng) for first in range(config.count)]
    raise UserError(
        f"eval.tasks.{name}.continuations: the held-out text of domain {config.domain} gave {len(found)} passages of "
        f"{config.context} + {config.length} characters that start where a word ends, and {wanted} are needed; lower "
        f"count ({config.count}), choices ({config.choices}), context or length, or raise data.held_out"
    )


def _question(rows: list[tuple[str, str]], rng: np.random.Generator) -> Question:
    """Rows of (passage, its context), of which the first is asked about."""
    order = rng.permutation(len(rows))
    return Question(rows[0][1], tuple(rows[row][0] for row in order), int(np.flatnonzero(order == 0)[0]))


class _Draws:
    """Random passages: documents by their tokens, places in a document evenly."""

    def __init__(self, config: ContinuationsConfig, part: Part, tokenizer: Tokenizer, rng: np.random.Generator) -> None:
        self._config, self._rng = config, rng
        self._sequences = open_indexed(config.domain, part.prefix)
        self._ends = np.cumsum(self._sequences.sequence_lengths[part.order].astype(np.int64))

        @lru_cache(_CACHED)
        def text_of(document: int) -> str:
            return tokenizer.decode(self._sequences.get(part.order[document]).tolist())

        self._text_of = text_of

    def one(self) -> tuple[str, str] | None:
        """A context and the passage that continues it; None where a document is too short for it just there."""
        document = int(np.searchsorted(self._ends, self._rng.integers(self._ends[-1]), side="right"))
        text = self._text_of(document)
        found = _START.search(text, int(self._rng.integers(len(text) + 1)))
        if found is None:
            return None
        first, place, last = found.start() - self._config.context, found.start(), found.start() + self._config.length
        if first < 0 or last > len(text) or _UNFIT.search(text, first, last):
            return None
        return text[first:place], text[place:last]
