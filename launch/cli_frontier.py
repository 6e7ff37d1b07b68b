"""``moescale study frontier``.

``predict`` asks one fitted law; the best model for a budget takes all that a study found (minima, laws, batches, rates,
speeds of runs), so it is a verb on a study's folder.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..base.errors import UserError
from .arguments import AsJson, StudyDirectory, World
from .output import console, note, print_json

if TYPE_CHECKING:  # numpy and scipy take a second
    from ..scaling.frontier import Best
    from .planned import Plan
    from .study_folder import StudyFolder

ForCluster = Annotated[
    Path | None,
    typer.Option("--cluster", help="a cluster file, or the name of a shipped one: what these models would cost there"),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="what they have otherwise than the study, as training.dtype=bf16"),
]
Computes = Annotated[list[float], typer.Option("--compute", help="training FLOPs by the exact count; may stand often")]


def register(study: typer.Typer) -> None:
    """Add the verb of this file to ``moescale study``."""
    study.command("frontier")(frontier)


def frontier(
    directory: StudyDirectory,
    compute: Computes,
    cluster: ForCluster = None,
    world: World = None,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """The best model of each family for a budget: size, tokens, mixture, batch, learning rate, loss, time."""
    from ..scaling.analysis import analyse
    from ..scaling.frontier import frontier as best
    from .collect import collect
    from .study_folder import StudyFolder

    check_computes(compute)
    if cluster is None and (world is not None or settings):
        raise UserError("--world and --set are for the models on a cluster: give --cluster too")
    folder = StudyFolder(directory)
    found = collect(folder)
    rows, missing = best(analyse(found.points, found.records, found.fits), compute)
    plan = _plan(folder, rows, cluster, world, settings or []) if cluster is not None and rows else None
    if as_json:
        priced = {"plan": plan.as_json()} if plan is not None else {}
        print_json({"rows": [asdict(row) for row in rows], "missing": missing} | priced)
        return
    print_frontier(rows, missing)
    if plan is not None:
        from .plan_table import render_placed

        console().print(render_placed(plan))
        for warning in plan.warnings:
            note(f"warning: {warning}")


def _plan(folder: "StudyFolder", rows: "list[Best]", cluster: Path, world: int | None, settings: list[str]) -> "Plan":
    from .cluster_config import load_cluster
    from .frontier_plan import plan_frontier

    runs = {run.name: run.config for run in folder.open()[1].runs}
    return plan_frontier(rows, runs, load_cluster(cluster), world, settings)


def check_computes(compute: Sequence[float]) -> None:
    """Refuse what are no FLOPs.

    Raises:
        UserError: names the value.
    """
    for value in compute:
        if not 0 < value < float("inf"):
            raise UserError(f"--compute ({value}): must be positive")


def print_frontier(rows: Sequence["Best"], missing: Sequence[str]) -> None:
    """A frontier for people, and what there is none of."""
    from ..scaling.optimum_report import FRONTIER_COLUMNS, frontier_rows
    from .tables import plain_table

    if rows:
        texts = frontier_rows(rows)  # remarks are sentences: a column of them would leave no room for the others
        console().print(plain_table(FRONTIER_COLUMNS[:-1], [text[:-1] for text in texts]))
        for compute, family, *_, remarks in texts:
            print(f"{compute} {family}: {remarks}")
    for text in missing:
        note(text)
