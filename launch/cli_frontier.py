"""``moescale study frontier``.

``predict`` asks one fitted law; the best model for a budget takes all that a study found (minima, laws, batches, rates,
speeds of runs), so it is a verb on a study's folder.
"""

from dataclasses import asdict
from typing import Annotated

import typer

from ..base.errors import UserError
from .arguments import AsJson, StudyDirectory
from .output import console, note, print_json

Computes = Annotated[list[float], typer.Option("--compute", help="training FLOPs by the exact count; may stand often")]


def register(study: typer.Typer) -> None:
    """Add the verb of this file to ``moescale study``."""
    study.command("frontier")(frontier)


def frontier(directory: StudyDirectory, compute: Computes, as_json: AsJson = False) -> None:
    """The best model of each family for a budget: size, tokens, mixture, batch, learning rate, loss, time."""
    from rich.table import Table

    from ..scaling.analysis import analyse
    from ..scaling.frontier import frontier as best
    from ..scaling.optimum_report import FRONTIER_COLUMNS, frontier_rows
    from .collect import collect
    from .study_folder import StudyFolder

    for value in compute:
        if not 0 < value < float("inf"):
            raise UserError(f"--compute ({value}): must be positive")
    found = collect(StudyFolder(directory))
    rows, missing = best(analyse(found.points, found.records, found.fits), compute)
    if as_json:
        print_json({"rows": [asdict(row) for row in rows], "missing": missing})
        return
    table = Table()
    for column in FRONTIER_COLUMNS:
        table.add_column(column, overflow="fold")
    for row in frontier_rows(rows):
        table.add_row(*row)
    if rows:
        console().print(table)
    for text in missing:
        note(text)
