"""Scores of downstream tasks against the held-out loss of the same model.

Models of equal loss need not answer alike, so families are compared at equal loss: parallel lines of score over loss. A
score over n questions has the standard error sqrt(p (1 - p) / n), of which a part is the choice of questions: runs that
are asked the same ones share that part, and lie closer together than their errors say.
"""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..base.files import write_atomically
from .cells import DENSE, finished
from .laws import Array
from .lines import Distance, distance
from .points import Point
from .record import Line, Record


@dataclass(frozen=True)
class Answered:
    """How one run answered one task after its last step.

    Attributes:
        task: its name; with the hash of its questions where runs were asked different ones under one name.
        score: share right by log-likelihood a character.
        raw_score: share right by log-likelihood.
        chance: share that a blind guess gets right on average.
        choice_loss: of the right choices given their contexts, nats a token.
        cut: questions whose context lost its beginning.
    """

    point: Point
    task: str
    hash: str
    score: float
    raw_score: float
    chance: float
    questions: int
    choice_loss: float | None
    cut: int

    @property
    def error(self) -> float:
        """Binomial standard error of the score."""
        return math.sqrt(self.score * (1 - self.score) / self.questions)

    @property
    def above_chance(self) -> bool:
        """By more than two standard errors of a blind guess."""
        blind = math.sqrt(self.chance * (1 - self.chance) / self.questions)
        return self.score > self.chance + 2 * blind


@dataclass(frozen=True)
class Gap:
    """By how much a family's score lies above the dense one's at equal held-out loss."""

    task: str
    family: str
    apart: Distance

    @property
    def resolved(self) -> bool:
        return abs(self.apart.value) > self.apart.reach


def answered(points: Sequence[Point], records: Mapping[str, Record]) -> list[Answered]:
    """Final scores of finished runs; runs that only check a setting or see later tokens are left out."""
    found = [
        _answered(point, line)
        for point in finished(points)
        if point.run in records
        for line in records[point.run].final_evals
        if line.get("task")
    ]
    return [_told_apart(one, found) for one in found]


def _answered(point: Point, line: Line) -> Answered:
    task = line["task"]
    return Answered(
        point, line["domain"], task["hash"], line["score"], task["raw_score"], task["chance"], task["questions"],
        line["loss"], task["cut"],
    )  # fmt: skip


def _told_apart(one: Answered, found: Sequence[Answered]) -> Answered:
    """Scores of different questions are not compared, whatever their tasks are called."""
    if len({other.hash for other in found if other.task == one.task}) == 1:
        return one
    return Answered(**{**vars(one), "task": f"{one.task} ({one.hash[:6]})"})


def gaps_at_loss(found: Sequence[Answered]) -> list[Gap]:
    """Every family against the dense one in every task, where enough runs of both share a range of losses."""
    gaps = []
    for task in dict.fromkeys(one.task for one in found):
        own = [one for one in found if one.task == task]
        for family in dict.fromkeys(one.point.family for one in own if one.point.family != DENSE):
            apart = distance(*_line(own, DENSE), *_line(own, family))
            if apart is not None:
                gaps.append(Gap(task, family, apart))
    return gaps


def _line(found: Sequence[Answered], family: str) -> tuple[Array, Array]:
    """Held-out loss and score of a family's runs."""
    values = [(one.point.loss, one.score) for one in found if one.point.family == family]
    loss, score = np.array(values, dtype=float).reshape(-1, 2).T
    return loss, score


COLUMNS = ("run", "family", "task", "hash", "loss", "score", "error", "raw_score", "chance", "questions",
           "choice_loss", "cut")  # fmt: skip


def write_answered(path: Path, found: Sequence[Answered]) -> None:
    """Write a CSV with a row for each run and task; ``loss`` is the run's held-out loss.

    Scores have a table of their own: a point is one run, which may be asked any number of tasks.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for one in found:
        values = {**vars(one), "run": one.point.run, "family": one.point.family, "loss": one.point.loss,
                  "error": one.error}  # fmt: skip
        writer.writerow(["" if values[name] is None else values[name] for name in COLUMNS])
    write_atomically(path, text.getvalue())
