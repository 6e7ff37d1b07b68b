"""Multiple-choice questions as text, and the files that hold them."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..base.errors import UserError
from ..base.files import digest, write_atomically

_KEYS = {"context", "choices", "answer"}


@dataclass(frozen=True)
class Question:
    """A context, what may follow it, and which of that does (from 0)."""

    context: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Questions:
    """The questions of a task. ``hash`` names them: equal hashes mean equal questions in equal order."""

    name: str
    content: Sequence[Question]

    @property
    def hash(self) -> str:
        return digest([asdict(question) for question in self.content])

    @property
    def chance(self) -> float:
        """Share that a blind guess gets right on average."""
        return sum(1 / len(question.choices) for question in self.content) / len(self.content)


def read_questions(name: str, path: Path) -> list[Question]:
    """Read JSON lines of ``{"context": text, "choices": [text, ...], "answer": index from 0}``; other keys are ignored.

    Raises:
        UserError: no such file, no question in it, or one that cannot be asked; names file and line.
    """
    where = f"eval.tasks.{name}.file ({path})"
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"{where}: cannot be read: {error.strerror}") from None
    found = [_question(line, f"{path}:{number}") for number, line in enumerate(lines, start=1) if line.strip()]
    if not found:
        raise UserError(f"{where}: holds no question")
    return found


def write_questions(path: Path, questions: Questions) -> None:
    """Write JSON lines that `read_questions` reads."""
    write_atomically(path, "".join(f"{json.dumps(asdict(question))}\n" for question in questions.content))


def _question(line: bytes, origin: str) -> Question:
    try:
        content = json.loads(line)
    except ValueError as error:
        raise UserError(f"{origin}: not a JSON object: {error}") from None
    if not isinstance(content, dict) or not content.keys() >= _KEYS:
        keys = ", ".join(sorted(content)) if isinstance(content, dict) else type(content).__name__
        raise UserError(f"{origin}: context, choices and answer are expected (found: {keys or 'nothing'})")
    context, choices, answer = content["context"], content["choices"], content["answer"]
    if not _is_text(context) or not context.strip():
        raise UserError(f"{origin}: context ({_short(context)}) must be text that is more than white space")
    if not isinstance(choices, list) or not all(_is_text(choice) and choice for choice in choices):
        raise UserError(f"{origin}: choices ({_short(choices)}) must be a list of texts, none of them empty")
    if len(choices) < 2 or len(set(choices)) < len(choices):
        raise UserError(f"{origin}: choices ({_short(choices)}) must be at least two, no two of them equal")
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise UserError(f"{origin}: answer ({_short(answer)}) must be the index of a choice, 0 to {len(choices) - 1}")
    return Question(context, tuple(choices), answer)


def _is_text(value: Any) -> bool:
    """Whether it is a string that UTF-8 can write: JSON can spell half of a surrogate pair."""
    try:
        return isinstance(value, str) and bool(value.encode() or True)
    except UnicodeEncodeError:
        return False


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
