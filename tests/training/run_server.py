"""A warm process that forks runs, so that tests pay for imports once: ``python run_server.py``.

Reads a line of JSON a command from stdin, answers with a line on stdout. ``{"start": [config, folder, log, bytes]}``
-> process id; the run may write files of at most so many bytes (null: any). ``{"poll": pid}`` -> exit code (negative:
the signal) or null while it runs.
"""

import json
import os
import resource
import sys
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")

from moescale.base.errors import EXIT_BAD_INPUT, UserError
from moescale.training.config import load_run
from moescale.training.run import train
from moescale.training.warm import import_all


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


def main():
    import_all()
    answer({"ready": True})
    for line in sys.stdin:
        command = json.loads(line)
        if "start" in command:
            pid = os.fork()
            if pid == 0:
                child(*command["start"])
            answer(pid)
        else:
            pid, status = os.waitpid(command["poll"], os.WNOHANG)
            answer(os.waitstatus_to_exitcode(status) if pid else None)


def answer(content):
    print(json.dumps(content), flush=True)


if __name__ == "__main__":
    main()
