"""``moescale convert``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from .output import console, note, print_json, stdout_for_results

if TYPE_CHECKING:
    from ..checkpoint.convert.ledger import Ledger


def register(app: typer.Typer) -> None:
    """Add the verb of this file."""
    app.command("convert")(convert)


def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="a run's folder, one of its checkpoints, or a model")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="a folder that does not exist yet")],
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help="moescale, megatron, hf-llama, hf-mixtral ...")],
    dtype: Annotated[
        Literal["fp32", "bf16", "fp16"], typer.Option("--dtype", help="what parameters are rounded to")
    ] = "fp32",
    config: Annotated[
        Path | None, typer.Option("--config", metavar="RUN.yaml", help="the architecture, where SRC does not hold it")
    ] = None,
    upcycle: Annotated[
        Path | None,
        typer.Option("--upcycle", metavar="RUN.yaml", help="make a dense SRC the mixture of this moe section"),
    ] = None,
    noise: Annotated[
        float, typer.Option("--noise", min=0, help="with --upcycle: std of what is added to experts, over their own")
    ] = 0.0,
    no_check: Annotated[
        bool, typer.Option("--no-check", help="do not compare logits, which takes both models in memory")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print the ledger as one JSON document")] = False,
) -> None:
    """Convert a model to or from moescale, Hugging Face and others, with every tensor accounted for."""
    with stdout_for_results():
        from ..compat.cuda_standin import install

        install()  # before Megatron is imported
        from ..checkpoint.convert.convert import convert as convert_folder
        from ..checkpoint.convert.run_folder import given_architecture
        from ..checkpoint.upcycle import load_upcycling

        given = None if config is None else given_architecture(config)
        upcycling = None if upcycle is None else load_upcycling(upcycle, noise)
        ledger = convert_folder(source, target, to, dtype=dtype, given=given, upcycling=upcycling, check=not no_check)
    if as_json:
        print_json(ledger.as_json())
    else:
        show(ledger)


def show(ledger: "Ledger") -> None:
    """What became of everything, for people: a table, then what needs saying."""
    from rich.table import Table

    table = Table("source tensors", "number", "stored as", "fate", "in the target")
    for row in ledger.rows():
        table.add_row(*row)
    console().print(table)
    ignored = [f"{s.key} ({s.why})" for s in ledger.settings if s.fate == "without effect"]
    if ignored:
        print(f"keys without effect on what the model computes: {', '.join(ignored)}")
    implied = [f"{t.name} ({t.why})" for t in ledger.targets if t.why]
    if implied:
        print(f"in the target alone: {', '.join(implied)}")
    if not ledger.files:
        note("warning: no tokenizer file was found to go along")
    logits = ledger.logits
    if logits["compared"]:
        said = f"logits agree to {logits['largest_difference']:.1e} (the largest is {logits['largest']:.3g})"
    else:
        said = f"logits were not compared ({logits['why']})"
    converted = sum(entry.fate == "converted" for entry in ledger.entries)
    left = len(ledger.entries) - converted
    print(f"{ledger.target['path']}: {converted} tensors converted, {left} left out, none lost; {said}")
