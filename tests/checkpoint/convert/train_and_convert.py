"""Trains the run of a file, then converts it, in a process of its own: ``RUN.yaml FOLDER TARGET FORMAT``."""

import sys
from pathlib import Path

from moescale.training.config import load_run
from moescale.training.run import train


def main() -> None:
    file, folder, target, to = sys.argv[1:]
    assert train(load_run(Path(file)), Path(folder), quiet=True) == 0
    from moescale.checkpoint.convert.convert import convert

    convert(Path(folder), Path(target), to)


if __name__ == "__main__":
    main()
