"""A warm process that forks runs, so that tests pay for imports once: ``python run_server.py``.

What comes with ``start`` (tests/helpers/warm_server.py) is ``[config, folder, log, bytes]``; the run may write files of
at most so many bytes (null: any).
"""

import os
import resource
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
warnings.filterwarnings("ignore")

from warm_server import serve

from moescale.base.errors import EXIT_BAD_INPUT, UserError
from moescale.training.config import load_run
from moescale.training.run import train


def child(config, folder, log, largest_file):
    """In the forked process: never returns."""
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    code = 1
    try:
        code = train(load_run(Path(config)), Path(folder), quiet=True)
    except UserError as error:
        print(error, flush=True)
        code = EXIT_BAD_INPUT
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


if __name__ == "__main__":
    serve(lambda start: child(*start))
