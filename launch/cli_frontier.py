"""``moescale study frontier``.

``predict`` asks one fitted law; the best model for a budget takes all that a study found (minima, laws, batches, rates,
speeds of runs), so it is a verb on a study's folder.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from ..base.errors import UserError
from .arguments import AsJson, StudyDirectory
from .output import console, note, print_json

if TYPE_CHECKING:  # numpy and scipy take a second
    from ..scaling.frontier import Best

Computes = Annotated[list[float], typer.Option("--compute", help="training FLOPs by the exact count; may stand often")]


def register(study: typer.Typer) -> None:
    """Add the verb of this file to ``moescale study``."""
    study.command("frontier")(frontier)


def frontier(directory: StudyDirectory, compute: Computes, as_json: AsJson = False) -> None:
    """The best model of each family for a budget: size, tokens, mixture, batch, learning rate, loss, time."""
    from ..scaling.analysis import analyse
    from ..scaling.frontier import frontier as best
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
    print_frontier(rows, missing)


def print_frontier(rows: Sequence["Best"], missing: Sequence[str]) -> None:
    """A frontier for people, and what there is none of."""
    from ..scaling.optimum_report import FRONTIER_COLUMNS, frontier_rows
    from .tables import plain_table

    if rows:
        console().print(plain_table(FRONTIER_COLUMNS, frontier_rows(rows)))
    for text in missing:
        note(text)
