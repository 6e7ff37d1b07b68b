"""Takes one step of a run and records it, without a checkpoint: ``large_step_worker.py CONFIG FOLDER [KEY=VALUE ...]``.

Prints planned and measured memory, bytes: the peak of the process on top of what it held after its imports. Then the
same configuration is laid out without memory, on one rank and on 16; prints what that showed.
"""

import json
import sys
import time
import warnings
from pathlib import Path

import torch

warnings.filterwarnings("ignore")
torch.set_num_threads(1)

from moescale.training.warm import import_all

import_all()

import psutil

from moescale.data import prepare
from moescale.launch.check_layout import check_layouts
from moescale.parallel.config import ParallelConfig
from moescale.parallel.groups import Groups
from moescale.parallel.launchers import Place
from moescale.parallel.world import leave, start
from moescale.training.budget import cost_of
from moescale.training.config import load_run
from moescale.training.recording import Recorder
from moescale.training.setup import build, peak_memory
from moescale.training.step import take_step


def main() -> None:
    config, folder = load_run(Path(sys.argv[1]), sys.argv[3:]), Path(sys.argv[2])
    vocab = prepare(config.data).vocab_size
    topology = config.check_layout(1)
    planned = cost_of(config, vocab, topology).memory_bytes
    before = psutil.Process().memory_info().rss
    start(Place(0, 1, 0, 1), 600)
    groups = Groups.build(topology)
    setup = build(config, groups)
    recorder = Recorder(setup, folder, 1, quiet=True)
    recorder.begin(None, 0.0)
    began = time.perf_counter()
    result = take_step(setup, 0, config.optimizer.lr, measure_noise=False, stop_asked=False)
    recorder.step(1, config.optimizer.lr, result, time.perf_counter() - began)
    recorder.end("done", 1, "")
    recorder.close()
    groups.destroy()
    leave()
    print(json.dumps({"planned": planned, "measured": peak_memory() - before}))
    spread = config.model_copy(update={"parallel": ParallelConfig(tensor=2, pipeline=4, expert=4)})
    layouts = [(config, vocab, topology), (spread, vocab, spread.check_layout(16))]
    print(json.dumps([check.as_json() for check in check_layouts(layouts)]))


if __name__ == "__main__":
    main()
