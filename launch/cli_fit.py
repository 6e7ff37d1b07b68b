"""``moescale fit``."""

from pathlib import Path
from typing import Annotated

import typer

from ..base.errors import UserError
from .arguments import AsJson
from .output import console, note, print_json


def register(app: typer.Typer) -> None:
    """Add the verb of this file."""
    app.command("fit")(fit)


def fit(
    points: Annotated[Path, typer.Argument(metavar="POINTS.csv", help="a table with a row for each run")],
    law: Annotated[str, typer.Option(help="name of the law")],
    mapping: Annotated[str, typer.Option("--map", metavar="n=COL,...", help="columns of the law's variables")] = "",
    hold_out: Annotated[str | None, typer.Option(help="points to predict instead of fit, such as 'c>=1e12'")] = None,
    bootstrap: Annotated[int, typer.Option(min=0, help="resamplings behind the intervals")] = 400,
    seed: Annotated[int, typer.Option(min=0, help="of the resampling")] = 0,
    out: Annotated[Path | None, typer.Option(help="file for the fit, which predict reads")] = None,
    as_json: AsJson = False,
) -> None:
    """Fit a law to a table of points, with intervals, a held-out error and warnings."""
    from ..scaling.laws import law_named
    from ..scaling.points import read_points
    from .fitting import fit_points

    columns = _mapping(mapping)
    chosen = law_named(law, {name: column for name, column in columns.items() if name != "loss"} or None)
    result = fit_points(read_points(points, columns), chosen, hold_out, bootstrap, seed)
    if out is not None:
        result.save(out)
    if as_json:
        print_json(result.as_json())
        return
    from .tables import fit_table

    console().print(fit_table(result))
    for warning in result.warnings:
        note(f"warning: {warning}")


def _mapping(text: str) -> dict[str, str]:
    """``n=COL,d=COL`` as a dictionary."""
    pairs: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, separator, column = (piece.strip() for piece in part.partition("="))
        if not separator or not name or not column:
            raise UserError(f"--map {text!r}: {part!r} is not VARIABLE=COLUMN, such as n=n_active")
        if name in pairs:
            raise UserError(f"--map {text!r}: {name} stands twice")
        pairs[name] = column
    return pairs
