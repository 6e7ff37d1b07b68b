"""``moescale analyse``."""

from pathlib import Path
from typing import Annotated

import typer

from .arguments import AsJson
from .cli_fit import columns_of
from .cli_frontier import check_computes, print_frontier
from .output import console, note, print_json


def register(app: typer.Typer) -> None:
    """Add the verb of this file."""
    app.command("analyse")(analyse)


def analyse(
    points: Annotated[Path, typer.Argument(metavar="POINTS.csv", help="a table with a row for each run")],
    mapping: Annotated[str, typer.Option("--map", metavar="c=COL,...", help="columns that are called otherwise")] = "",
    compute: Annotated[
        list[float] | None, typer.Option(help="FLOPs: the best model of each family for them; may stand often")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE.html", help="write the whole report, with plots")] = None,
    as_json: AsJson = False,
) -> None:
    """Say what a table of runs shows: optimal sizes and settings, their growth, dense against mixtures."""
    from .analyse_table import AnalysedTable, table_as_json
    from .tables import block_tables

    check_computes(compute or [])
    found = AnalysedTable.read(points, columns_of(mapping))
    rows, missing = found.frontier(compute or [])
    if out is not None:
        found.write_report(out)
    if as_json:
        print_json(table_as_json(found, rows, missing))
        return
    for line in found.headlines:
        print(line)
    for table in block_tables(found.blocks):
        console().print(table)
    print_frontier(rows, missing)
    for warning in found.warnings:
        note(f"warning: {warning}")
    if out is not None:
        print(f"report: {out}")
