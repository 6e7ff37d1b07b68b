"""A warm process that forks the ranks of runs that are to fail, so that tests pay for imports once.

What comes with ``start`` (tests/helpers/warm_server.py) is ``{"config", "folder", "log", "environment", "fault"}``.
A fault is ``[kind, step]``: what happens on that rank before that step (from 0).
"""

import os
import resource
import sys
import time
import traceback
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
warnings.filterwarnings("ignore")

import torch
from warm_server import serve

from moescale.base.errors import EXIT_BAD_INPUT, UserError
from moescale.training.config import load_run
from moescale.training.run import train


def fail(kind, setup):
    if kind == "raise":
        raise MemoryError("no room for the activations")
    if kind == "sleep":
        time.sleep(1000)
    if kind == "disk":
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    if kind == "parameter":
        poison(setup, "layers.1.moe.experts.3.down")
    if kind == "gradient":
        spoil_gradient(setup, "layers.1.moe.experts.2.up")


def poison(setup, name):
    for entry in setup.state.entries.values():
        for piece in entry.pieces:
            if piece.name == name:
                with torch.no_grad():
                    piece.read(entry.parameter)[0, 0] = float("nan")


def spoil_gradient(setup, name):
    """What an overflow in one product of the backward pass would leave."""
    for entry in setup.state.entries.values():
        for piece in entry.pieces:
            if piece.name == name:

                def spoil(gradient, piece=piece):
                    piece.read(gradient)[0, 0] = float("inf")
                    return gradient

                entry.parameter.register_hook(spoil)


def inject(kind, at):
    from moescale.training import facts, loop

    if kind == "code":
        original = facts.versions
        facts.versions = lambda: {**original(), "source code of moescale": "another"}
        return
    take_step = loop.take_step

    def failing(setup, step, *arguments, **more):
        if step == at:
            fail(kind, setup)
        return take_step(setup, step, *arguments, **more)

    loop.take_step = failing


def child(job):
    """In the forked process: never returns."""
    with open(job["log"], "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(job["environment"])
    code = 1
    try:
        if job["fault"]:
            inject(*job["fault"])
        code = train(load_run(Path(job["config"])), Path(job["folder"]), quiet=True)
    except UserError as error:
        print(error, flush=True)
        code = EXIT_BAD_INPUT
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve(child)
