"""Saving in one call, for tests that are about something else."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moescale.checkpoint.boxes import Box, Cut, Held
from moescale.checkpoint.saver import Saver


def save(root: Path, step: int, held: list[Held], extra: dict[str, Any]) -> None:
    with Saver(root) as saver:
        saver.save(step, held, extra, background=False)


def held_as(boxes: Iterable[Box]) -> list[Held]:
    """Each box as a range of its own."""
    return [
        Held(box.part, (Cut(box.piece, ((0, box.values.numel()),)),), box.values.contiguous().flatten())
        for box in boxes
    ]
