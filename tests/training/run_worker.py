"""One rank of a real run: ``python run_worker.py CONFIG.yaml FOLDER``; exits with the run's exit code."""

import sys
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")

from moescale.base.errors import EXIT_BAD_INPUT, UserError
from moescale.training.config import load_run
from moescale.training.run import train

if __name__ == "__main__":
    try:
        code = train(load_run(Path(sys.argv[1])), Path(sys.argv[2]), quiet=True)
    except UserError as error:
        print(error, file=sys.stderr)
        code = EXIT_BAD_INPUT
    sys.exit(code)
