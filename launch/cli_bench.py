"""``moescale bench``."""

from typing import Annotated, Literal

import typer

from .arguments import AsJson
from .environment import ALLOCATOR
from .output import console, note, print_json


def register(app: typer.Typer) -> None:
    """Add the verb of this file."""
    app.command("bench")(bench)


def bench(
    name: Annotated[
        str,
        typer.Argument(
            help="a layer (moe), its operations (dispatch), rows between ranks (exchange), a step, the "
            "fitter (fit), a checkpoint, a conversion (convert)"
        ),
    ],
    against: Annotated[str | None, typer.Option(metavar="LIST", help="peers beside ours; default: all")] = None,
    case: Annotated[str | None, typer.Option(metavar="LIST", help="default: those the benchmark runs")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="default: those of each case")] = None,
    allocator: Annotated[
        Literal["tuned", "default", "both"], typer.Option(help="glibc's settings, the same for all rows of a table")
    ] = "tuned",
    rounds: Annotated[int, typer.Option(min=1, help="turns of each implementation")] = 15,
    as_json: AsJson = False,
) -> None:
    """Measure ours, its peers and the floor side by side, in turns."""
    from ..benchmarks.run import run

    settings = {"tuned": ALLOCATOR, "default": {}}
    report = run(
        name,
        allocators=settings if allocator == "both" else {allocator: settings[allocator]},
        against=None if against is None else _list(against),
        cases=None if case is None else _list(case),
        threads=threads,
        rounds=rounds,
        say=note,
    )
    if as_json:
        print_json(report.as_json())
    else:
        console().print(report.table())


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
