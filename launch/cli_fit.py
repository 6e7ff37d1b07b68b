"""``moescale fit``."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from ..base.errors import UserError
from .arguments import AsJson
from .output import console, note, print_json


def register(app: typer.Typer) -> None:
    """Add the verb of this file."""
    app.command("fit")(fit)


def fit(
    points: Annotated[Path, typer.Argument(metavar="POINTS.csv", help="a table with a row for each run")],
    law: Annotated[
        str | None, typer.Option(help="name of a law, or your own: package.module:NAME, file.py:NAME")
    ] = None,
    compare: Annotated[str | None, typer.Option(metavar="LAW,LAW,...", help="laws to set side by side")] = None,
    mapping: Annotated[str, typer.Option("--map", metavar="n=COL,...", help="columns of the law's variables")] = "",
    hold_out: Annotated[str | None, typer.Option(help="points to predict instead of fit, such as 'c>=1e12'")] = None,
    weight: Annotated[str | None, typer.Option(metavar="COL", help="column of the points' weights")] = None,
    sd: Annotated[
        str | None, typer.Option(metavar="COL", help="column of standard deviations of log loss; weight 1 / sd^2")
    ] = None,
    huber: Annotated[float, typer.Option(help="residuals beyond it count linearly; large: least squares")] = 1e-3,
    residuals: Annotated[
        Literal["log", "loss"], typer.Option(help="of the natural logarithm, or of the loss itself")
    ] = "log",
    bootstrap: Annotated[int, typer.Option(min=0, help="resamplings behind the intervals")] = 400,
    seed: Annotated[int, typer.Option(min=0, help="of the resampling")] = 0,
    out: Annotated[Path | None, typer.Option(help="file for the fit, which predict reads")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png|html", help="residuals as a picture")] = None,
    as_json: AsJson = False,
) -> None:
    """Fit a law to a table of points, with intervals, a held-out error and warnings; or compare laws."""
    from .fit_command import FitOptions, compare_laws, fit_law
    from .fit_tables import contest_table, fit_table, fit_words

    if (law is None) == (compare is None):
        raise UserError("give --law NAME for a fit, or --compare NAME,NAME for a comparison")
    options = FitOptions(points, columns_of(mapping), hold_out, weight, sd, huber, residuals, seed)
    if compare is not None:
        if out is not None or plot is not None:
            raise UserError("--out and --plot take the fit of one law: give --law instead of --compare")
        contest = compare_laws(options, [name.strip() for name in compare.split(",") if name.strip()])
        if as_json:
            print_json(contest.as_json())
        else:
            console().print(contest_table(contest))
        return
    assert law is not None
    result = fit_law(options, law, bootstrap, plot)
    if out is not None:
        result.save(out)
    if as_json:
        print_json(result.as_json())
        return
    console().print(fit_table(result))
    print(fit_words(result))
    for warning in result.warnings:
        note(f"warning: {warning}")


def columns_of(text: str) -> dict[str, str]:
    """``n=COL,d=COL`` as a dictionary.

    Raises:
        UserError: it is none.
    """
    pairs: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, separator, column = (piece.strip() for piece in part.partition("="))
        if not separator or not name or not column:
            raise UserError(f"--map {text!r}: {part!r} is not VARIABLE=COLUMN, such as n=n_active")
        if name in pairs:
            raise UserError(f"--map {text!r}: {name} stands twice")
        pairs[name] = column
    return pairs
