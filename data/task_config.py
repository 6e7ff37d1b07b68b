"""What a downstream task is made of (``eval.tasks`` of a run file)."""

import re
from typing import Self

from pydantic import BaseModel, Field, model_validator

_NAME = r"[A-Za-z0-9][A-Za-z0-9_-]*"


class ContinuationsConfig(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """Questions made of held-out text: which of several passages goes on from a context.

    Contexts and choices are cut where a word ends; all choices have ``length`` characters, so that none is likelier for
    being short.
    """

    domain: str = Field(description="whose held-out documents")
    count: int = Field(256, ge=1, le=100_000, description="questions")
    choices: int = Field(4, ge=2, le=100, description="the true continuation and so many less one of other passages")
    context: int = Field(200, ge=1, description="characters before the continuation")
    length: int = Field(60, ge=1, description="characters of each choice")
    seed: int = Field(0, ge=0, description="another seed is another draw of passages")


class TaskConfig(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """Multiple-choice questions. Exactly one of ``file`` and ``continuations``."""

    file: str | None = Field(
        None,
        description='JSON lines {"context": ..., "choices": [...], "answer": index}, relative to the working folder',
    )
    continuations: ContinuationsConfig | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = [key for key in ("file", "continuations") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of file, continuations (given: {', '.join(given) or 'none'})")
        return self


def check_task_name(name: str) -> None:
    """Names go into file names and into lm-evaluation-harness' list of tasks.

    Raises:
        ValueError: this one cannot.
    """
    if not re.fullmatch(_NAME, name):
        raise ValueError(f"eval.tasks.{name}: names files, so use letters, digits, - and _ only")
