"""Trains the run of a file, and converts it, in a process of its own: ``RUN.yaml FOLDER [TARGET FORMAT]``."""

import sys
from pathlib import Path

from moescale.training.config import load_run
from moescale.training.run import train


def main() -> None:
    file, folder, *rest = sys.argv[1:]
    assert train(load_run(Path(file)), Path(folder), quiet=True) == 0
    if rest:
        from moescale.checkpoint.convert.convert import convert

        convert(Path(folder), Path(rest[0]), rest[1])


if __name__ == "__main__":
    main()
