"""The command line. Each verb's file is imported with the application, what it works with only when it runs."""

import os
import sys

import typer

from ..base.errors import EXIT_BAD_INPUT, UserError
from . import cli_bench, cli_fit, cli_study, cli_train

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
cli_bench.register(app)


def main() -> None:
    """Entry point: exit code 2 with one message where the input was wrong, 1 with a traceback where we failed."""
    try:
        app()
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        print(f"error{'' if rank == '0' else f' (rank {rank})'}: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
