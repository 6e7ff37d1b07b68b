"""Prints planned and measured growth of memory after a few steps, bytes: ``memory_worker.py CONFIG FOLDER``."""

import json
import sys
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")

import psutil

from moescale.training.warm import import_all

import_all()

from moescale.data import prepare
from moescale.scaling.record import read_record
from moescale.training.budget import cost_of
from moescale.training.config import load_run
from moescale.training.run import train

if __name__ == "__main__":
    config, folder = load_run(Path(sys.argv[1])), Path(sys.argv[2])
    planned = cost_of(config, prepare(config.data).vocab_size, config.check_layout(1)).memory_bytes
    before = psutil.Process().memory_info().rss
    train(config, folder, quiet=True)
    print(json.dumps([planned, read_record(folder).steps[-1]["memory_bytes"] - before]))
