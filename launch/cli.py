"""The command line. Each verb's file is imported with the application, what it works with only when it runs."""

import sys

import typer

from ..base.errors import EXIT_BAD_INPUT, EXIT_FAILED, UserError
from ..base.files import is_storage_failure
from . import cli_analyse, cli_bench, cli_convert, cli_fit, cli_predict, cli_study, cli_train
from .environment import world_of_launcher

app = typer.Typer(
    name="moescale",
    help="From a sweep file to a fitted, checked scaling law for dense and Mixture-of-Experts language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
cli_train.register(app)
cli_study.register(app)
cli_fit.register(app)
cli_predict.register(app)
cli_analyse.register(app)
cli_bench.register(app)
cli_convert.register(app)


def main() -> None:
    """Entry point: 2 and one message where the input was wrong, 1 where we failed.

    A failure comes with a traceback, unless it was the disk's.
    """
    place = _place()
    try:
        app()
    except UserError as error:
        print(f"error{place}: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    except OSError as error:
        if not is_storage_failure(error):
            raise
        print(f"failed{place}: {error}. What was saved is intact: make room and start again", file=sys.stderr)
        sys.exit(EXIT_FAILED)


def _place() -> str:
    """Which rank speaks; nothing for rank 0, and where that is what is wrong."""
    try:
        rank, _ = world_of_launcher()
    except UserError:
        return ""
    return f" (rank {rank})" if rank else ""
