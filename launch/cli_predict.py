"""``moescale predict``."""

from pathlib import Path
from typing import Annotated

import typer

from ..base.errors import UserError
from .arguments import AsJson
from .output import print_json


def register(app: typer.Typer) -> None:
    """Add the verb of this file."""
    app.command("predict")(predict)


def predict(
    file: Annotated[Path, typer.Argument(metavar="FIT.json", help="what fit --out or study collect wrote")],
    compute: Annotated[float | None, typer.Option(help="FLOPs: the best model for them")] = None,
    n: Annotated[float | None, typer.Option("--n", help="parameters, as the law counts them")] = None,
    d: Annotated[float | None, typer.Option("--d", help="training tokens")] = None,
    e: Annotated[float | None, typer.Option("--e", help="routed experts")] = None,
    g: Annotated[float | None, typer.Option("--g", help="granularity, 4 width / expert width")] = None,
    s: Annotated[float | None, typer.Option("--s", help="sparsity, 1 - active / experts")] = None,
    study: Annotated[
        Path | None, typer.Option(help="folder of a study: predict its runs named by --for, and register that there")
    ] = None,
    register_file: Annotated[
        Path | None, typer.Option("--register", metavar="FILE.jsonl", help="append the prediction to this register")
    ] = None,
    runs: Annotated[
        list[str] | None, typer.Option("--for", metavar="RUN", help="run of the study, or a name for the register")
    ] = None,
    after: Annotated[
        bool, typer.Option("--after", help="register it although the run's loss is known; the register says so")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Predict a loss from a fitted law, or the best model for a compute budget; with --register or --study for good."""
    from .predict import predict_from
    from .tables import prediction_text, registered_text

    numbers = {"n": n, "d": d, "e": e, "g": g, "s": s}
    given = {name: value for name, value in numbers.items() if value is not None}
    if study is None and register_file is None:
        _refuse({"--for": runs, "--after": after}, "needs --study DIR or --register FILE.jsonl")
        prediction = predict_from(file, compute, given)
        print_json(prediction) if as_json else print(prediction_text(prediction))
        return
    from .predictions import register_runs, register_values

    if study is not None:
        _refuse({"--compute": compute, **{f"--{name}": value for name, value in given.items()}},
                "is not for --study, whose runs say what they are")  # fmt: skip
        if not runs:
            raise UserError("--study: name the runs to predict with --for RUN (study plan lists them)")
        found = register_runs(file, study, runs, after, register_file)
    else:
        assert register_file is not None
        _refuse({"--after": after}, "is for runs of a study (--study DIR)")
        if len(runs or ()) != 1:
            raise UserError("--register: give the prediction one name, with --for NAME")
        values = given if compute is None else {**given, "c": compute}
        found = [register_values(file, values, (runs or [""])[0], register_file)]
    if as_json:
        print_json({"registered": [one.as_json() for one in found]})
    else:
        for one in found:
            print(registered_text(one))


def _refuse(given: dict[str, object], why: str) -> None:
    for option, value in given.items():
        if value not in (None, False, []):
            raise UserError(f"{option}: {why}")
