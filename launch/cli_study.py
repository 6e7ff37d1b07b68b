"""``moescale study``: plan, run, collect and report; the verbs of clusters are in cli_cluster.py."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..base.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, UserError
from . import cli_cluster, cli_frontier
from .arguments import AsJson, Overrides, StudyDirectory, StudyFile, World
from .environment import restart_with_allocator_settings
from .output import console, note, print_json, stdout_for_results

if TYPE_CHECKING:
    from ..parallel.topology import Topology
    from ..training.config import RunConfig
    from .check_layout import LayoutCheck
    from .planned import Plan
    from .study_config import StudyConfig
    from .study_folder import StudyFolder

Out = Annotated[Path | None, typer.Option(help="folder of the study; default: studies/NAME")]
NodeRanks = Annotated[int, typer.Option(min=0, help="ranks on each node, to tell groups that reach over several")]
ForCluster = Annotated[
    Path | None,
    typer.Option("--cluster", help="a cluster file, or the name of a shipped one: choose each run's layout for it"),
]
CheckLayout = Annotated[
    bool, typer.Option("--check-layout", help="build ranks of every layout without memory: is each parameter held once")
]


def register(app: typer.Typer) -> None:
    """Add the verbs of this file."""
    study = typer.Typer(help="Sweeps: plan, run or submit, watch, report.", no_args_is_help=True)
    for verb in (plan, run, collect, report):
        study.command(verb.__name__)(verb)
    cli_cluster.register(study)
    cli_frontier.register(study)
    app.add_typer(study, name="study")


def plan(
    file: StudyFile,
    overrides: Overrides = None,
    cluster: ForCluster = None,
    world: World = None,
    node_ranks: NodeRanks = 0,
    check_layout: CheckLayout = False,
    as_json: AsJson = False,
) -> None:
    """Show every run of a study with its cost, before anything starts."""
    from .cluster_config import load_cluster
    from .expansion import expand
    from .held_out import predicted_runs
    from .placing import placed
    from .plan import plan_study
    from .plan_table import render_checks
    from .plan_warnings import found_tokens, node_warnings, text_warnings
    from .study_config import load_study

    study = load_study(file, overrides)
    expansion = expand(study)
    if cluster is not None:
        if node_ranks:
            raise UserError(f"--node-ranks ({node_ranks}): the cluster file says that; leave it out")
        expansion = placed(expansion, load_cluster(cluster), world)
    planned = plan_study(study, expansion, world)
    last = predicted_runs(study, expansion, planned)
    configs = {run.name: run.config for run in expansion.runs}
    on_node = {run.name: run.choice.node_ranks if run.choice is not None else node_ranks for run in expansion.runs}
    topologies = {
        row.name: configs[row.name].check_layout(row.layout["world"], on_node[row.name]) for row in planned.rows
    }
    planned = planned.warning(text_warnings(planned, expansion.runs, found_tokens(expansion.runs)))
    planned = planned.warning(node_warnings(topologies))
    checks = _check([(configs[name], topology) for name, topology in topologies.items()]) if check_layout else None
    if as_json:
        found = {"layouts": [check.as_json() for check in checks]} if checks is not None else {}
        print_json(planned.as_json() | found)
    else:
        _show_plan(planned, study)
        if last:
            note(f"{len(last)} runs are held out: trained last, after the register says what fits expect of them")
        if checks is not None:
            console().print(render_checks(checks))
    faults = [f"{check.runs[0]}: {fault}" for check in checks or () for fault in check.faults]
    for fault in faults:
        note(f"layout: {fault}")
    raise typer.Exit(EXIT_FAILED if faults else EXIT_DONE)


def _check(runs: "list[tuple[RunConfig, Topology]]") -> "list[LayoutCheck]":
    from .check_layout import check_layouts
    from .vocabularies import Vocabularies

    vocabularies = Vocabularies()
    with stdout_for_results():
        return check_layouts((config, vocabularies.of(config.data), topology) for config, topology in runs)


def _show_plan(planned: "Plan", study: "StudyConfig") -> None:
    from .plan_table import render, render_placed

    on_cluster = any(row.speed is not None for row in planned.rows)
    console().print(render_placed(planned) if on_cluster else render(planned))
    if study.lr_rule is not None:
        note(study.lr_rule.describe())
    for warning in planned.warnings:
        note(f"warning: {warning}")


def run(file: StudyFile, overrides: Overrides = None, out: Out = None, as_json: AsJson = False) -> None:
    """Do what is not done yet of a study, several runs at once, and write its report."""
    restart_with_allocator_settings()
    from .expansion import expand
    from .study_config import load_study
    from .study_folder import StudyFolder
    from .study_run import run_study

    study = load_study(file, overrides)
    expansion = expand(study)
    folder = StudyFolder(out if out is not None else Path("studies") / study.name)
    with stdout_for_results():
        code = run_study(study, expansion, folder, quiet=as_json)
        summary = _summary(folder) if code != EXIT_STOPPED else None
    if as_json:
        print_json({"exit_code": code, **(summary or {"folder": str(folder.path)})})
    elif summary is not None:
        _show(summary)
    else:
        note("stopped on request; the same command goes on from here")
    raise typer.Exit(code)


def collect(directory: StudyDirectory, as_json: AsJson = False) -> None:
    """Write points.csv and the fits of a study from its run folders."""
    from .collect import as_json as to_json
    from .collect import collect as collect_study
    from .study_folder import StudyFolder

    folder = StudyFolder(directory)
    summary = to_json(collect_study(folder), folder)
    if as_json:
        print_json(summary)
    else:
        _show(summary)


def report(directory: StudyDirectory, as_json: AsJson = False) -> None:
    """Write the report of a study, from what its runs have recorded so far."""
    from .report import write_report
    from .study_folder import StudyFolder

    summary = write_report(StudyFolder(directory))
    if as_json:
        print_json(summary)
    else:
        _show(summary)


def _summary(folder: "StudyFolder") -> dict[str, Any]:
    """The summary of an up-to-date report, written anew only if runs have moved on since."""
    from .report import summary_of_report, write_report

    return summary_of_report(folder) or write_report(folder)


def _show(summary: dict[str, Any]) -> None:
    for line in summary["headlines"]:
        print(line)
    for warning in summary["warnings"]:
        note(f"warning: {warning}")
    for failure in summary["failed"]:
        note(f"failed: {failure['run']}: {failure['reason']}")
    print(f"{summary['done']} runs done; points: {summary['points']}")
    if "report" in summary:
        print(f"report: {summary['report']}")
