"""One rank of the parity proof: runs cases under a layout and stores what it computed, by logical names.

Started by test_parity.py, one process a rank, as ``python parity_worker.py JOB.json``.
"""

import json
import sys
import warnings
from pathlib import Path

import torch

warnings.filterwarnings("ignore")
torch.set_num_threads(1)

from moescale.base.config import validate
from moescale.compat.cuda_standin import install
from moescale.parallel.world import Place, leave, start
from moescale.training.config import RunConfig

install()

from moescale.parallel.groups import Groups
from moescale.training.setup import build
from moescale.training.step import take_step


def capture_gradients(setup, into):
    """Store the reduced gradients just before each optimizer step uses them."""
    engine = setup.engine
    step = engine.step

    def capturing(lr):
        held = [(p, first, g.clone()) for p, first, g in engine.reduced_gradients()]
        into.append(boxes(setup.state.boxes_of("gradient", held)))
        step(lr)

    engine.step = capturing


def boxes(found):
    return [(b.part, b.piece.name, b.piece.shape, b.piece.start, b.values.clone()) for b in found]


def run_case(case, place):
    config = validate(RunConfig, case["config"], case["name"])
    groups = Groups.build(config.check_layout(place.world))
    setup = build(config, groups)
    gradients = []
    capture_gradients(setup, gradients)
    results = []
    for step in range(case["steps"]):
        measure = config.noise.every > 0
        results.append(take_step(setup, step, config.optimizer.lr, measure_noise=measure, stop_asked=False))
    stored = {"results": results, "gradients": gradients, "state": boxes(setup.state.boxes())}
    parameters = {
        piece.name: piece.read(entry.parameter.detach()).clone()
        for entry in setup.state.entries.values()
        for piece in entry.pieces
        if all(s == e for s, e in zip(piece.shape, piece.extent, strict=True))
    }
    stored["replicated"] = parameters  # whole tensors on this rank: every replica must agree
    groups.destroy()
    return stored


def main():
    job = json.loads(Path(sys.argv[1]).read_text())
    place = Place.from_environment()
    start(place, 60)
    for case in job["cases"]:
        torch.save(run_case(case, place), Path(job["out"]) / f"{case['name']}.{place.rank}.pt")
    leave()


if __name__ == "__main__":
    main()
