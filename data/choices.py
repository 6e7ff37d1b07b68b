"""Multiple-choice questions as windows of tokens: one for each choice, behind its context.

Texts become tokens as in lm-evaluation-harness 0.4 (EleutherAI; ``TemplateLM._encode_pair``), so that both score the
same tokens: white space at the end of a context goes to its choices; the context is encoded alone, then together with
each choice, and what follows as many tokens as it has alone is the choice. (Where a piece reaches from the context into
the choice, what is scored is therefore not quite the text; a choice that starts with a space has no such piece.) A
context that does not fit loses its beginning.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..base.errors import UserError
from .questions import Question, Questions
from .tokenizer import Tokenizer
from .windows import Windows


@dataclass(frozen=True)
class Choices(Windows):
    """The choices of all questions, one question after the other; labels of a choice count, its context's do not.

    Attributes:
        questions: where they come from.
        question_N: int64, which question a row belongs to.
        lengths_N: characters of each choice, without what its context gave it, as lm-evaluation-harness counts them.
        right_Q: int64, row of each question's answer.
        n_bytes, n_tokens: of the right choices.
        cut: questions some of whose rows lost the beginning of their context.
    """

    questions: Questions
    question_N: np.ndarray
    lengths_N: np.ndarray
    right_Q: np.ndarray
    n_bytes: int
    n_tokens: int
    cut: int


def encode_choices(questions: Questions, tokenizer: Tokenizer, seq: int) -> Choices:
    """Windows of ``seq`` tokens.

    Raises:
        UserError: a choice is longer than that, or adds no token to its context.
    """
    content = questions.content
    sizes = np.array([len(question.choices) for question in content], dtype=np.int64)
    question_N = np.repeat(np.arange(len(content)), sizes)
    pairs = _encode(content, tokenizer)
    _check(questions, question_N, pairs, seq)
    right_Q = np.cumsum(sizes) - sizes + np.array([question.answer for question in content], dtype=np.int64)
    text_NS = np.full((len(pairs), seq + 1), tokenizer.eod, dtype=np.int64)
    counted_NS = np.zeros((len(pairs), seq), dtype=bool)
    for row, (context, choice) in enumerate(pairs):
        whole = np.concatenate([context, choice])[-(seq + 1) :]
        text_NS[row, : len(whole)] = whole
        counted_NS[row, len(whole) - 1 - len(choice) : len(whole) - 1] = True
    labels_NS = text_NS[:, 1:]
    right_labels = labels_NS[right_Q][counted_NS[right_Q]]
    too_long = np.array([len(context) + len(choice) > seq + 1 for context, choice in pairs])
    return Choices(
        tokens_NS=torch.from_numpy(text_NS[:, :-1].copy()),
        labels_NS=torch.from_numpy(labels_NS.copy()),
        mask_NS=torch.from_numpy(counted_NS).float(),
        questions=questions,
        question_N=question_N,
        lengths_N=np.array([len(choice) for question in content for choice in question.choices], dtype=np.int64),
        right_Q=right_Q,
        n_bytes=int(tokenizer.piece_sizes[right_labels].sum()),
        n_tokens=len(right_labels),
        cut=len(set(question_N[too_long].tolist())),
    )


def _encode(content: Sequence[Question], tokenizer: Tokenizer) -> list[tuple[np.ndarray, np.ndarray]]:
    """Tokens of each choice's context, and of the choice."""
    contexts = [question.context.rstrip() for question in content]
    of_context = tokenizer.encode_many(contexts)
    whole = tokenizer.encode_many([question.context + choice for question in content for choice in question.choices])
    pairs, row = [], 0
    for question, before in zip(content, of_context, strict=True):
        for together in whole[row : row + len(question.choices)]:
            pairs.append((before, together[len(before) :]))
        row += len(question.choices)
    return pairs


def _check(
    questions: Questions, question_N: np.ndarray, pairs: Sequence[tuple[np.ndarray, np.ndarray]], seq: int
) -> None:
    for number, (_, choice) in zip(question_N, pairs, strict=True):
        where = f"eval.tasks.{questions.name}, question {number + 1} ({questions.content[number].context[-40:]!r})"
        if not len(choice):
            raise UserError(f"{where}: a choice adds no token to its context; choices must differ from it in more")
        if len(choice) > seq:
            raise UserError(
                f"{where}: a choice takes {len(choice)} tokens and training.seq is {seq}; shorten the choices, or "
                "leave the question out"
            )
