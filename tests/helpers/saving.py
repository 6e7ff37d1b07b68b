"""Saving, and finding what was saved, in one call, for tests that are about something else."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moescale.checkpoint.boxes import Box, Cut, Held
from moescale.checkpoint.saver import Saver
from moescale.checkpoint.shards import BadCheckpoint
from moescale.checkpoint.storage import Checkpoint, folder_of, steps_in


def save(root: Path, step: int, held: list[Held], extra: dict[str, Any]) -> None:
    with Saver(root) as saver:
        saver.save(step, held, extra, background=False)


def held_as(boxes: Iterable[Box]) -> list[Held]:
    """Each box as a range of its own."""
    return [
        Held(box.part, (Cut(box.piece, ((0, box.values.numel()),)),), box.values.contiguous().flatten())
        for box in boxes
    ]


def latest_good(root: Path) -> tuple[Checkpoint | None, list[str]]:
    """The latest undamaged checkpoint under ``root``, read from end to end, and what was wrong with later ones."""
    complaints: list[str] = []
    for step in reversed(steps_in(root)):
        try:
            checkpoint = Checkpoint(folder_of(root, step))
            checkpoint.verify()
            return checkpoint, complaints
        except BadCheckpoint as error:
            complaints.append(str(error))
    return None, complaints
