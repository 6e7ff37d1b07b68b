"""Records of runs that were never trained, line by line like the golden one."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moescale.launch.planned import PlannedRun
from moescale.launch.study_folder import StudyFolder
from moescale.models.counts import count_parameters
from moescale.scaling.condensed import read_condensed
from moescale.scaling.record import RECORD
from moescale.training.status import write_status

_GOLDEN = Path(__file__).parents[1] / "scaling" / "data" / "record_v1.jsonl"
_NOISE_EVERY = 20
_LAYERS = 2


def write_records(folder: StudyFolder, runs: Iterable[PlannedRun], steps: int) -> None:
    """A record of ``steps`` steps for each run, measured noise and router statistics included, and its status."""
    golden = [json.loads(line) for line in _GOLDEN.read_text().splitlines()]
    header, step, evaluation, end = (
        next(line for line in golden if line["kind"] == kind) for kind in ("header", "step", "eval", "end")
    )
    noise = next(line["noise"] for line in golden if line["kind"] == "step" and line["noise"])
    router = next(line["router"] for line in golden if line["kind"] == "step" and line["router"])[:1] * _LAYERS
    trained = [
        {**step, "step": n, "tokens": 512 * n, "loss": 7 - 4 * n / steps, "lr": 0.01, "router": router,
         "noise": None if n % _NOISE_EVERY else noise}
        for n in range(1, steps + 1)
    ]  # fmt: skip
    body = "".join(_line(line) for line in trained)
    for run in runs:
        config = run.config
        counts = count_parameters(config.model, config.moe, vocab=1024)
        found = {"total": counts.total, "active": counts.active, "embedding": counts.embedding, "router": counts.router}
        own = {"run": run.name, "seed": config.training.seed, "scientific_hash": config.scientific_hash}
        loss = 1.5 + (400 / counts.active) ** 0.33 + 0.01 * config.training.seed
        final = {**evaluation, "step": steps, "tokens": 512 * steps, "domain": "held_out", "loss": loss}
        place = folder.run(run.name)
        place.mkdir(parents=True)
        first = _line({**header, **own, "parameters": found})
        (place / RECORD).write_text(first + body + _line(final) + _line({**end, "state": "done", "why": ""}))
        read_condensed(place)  # as a run does when it ends
        write_status(place, "done", step=steps, steps_total=steps)


def _line(content: dict[str, Any]) -> str:
    return json.dumps(content, separators=(",", ":")) + "\n"
