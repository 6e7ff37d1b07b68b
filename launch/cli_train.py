"""``moescale doctor``, ``moescale data prepare``, ``moescale data tasks`` and ``moescale train``."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from ..base.config import apply_overrides, load_yaml, validate
from ..base.errors import EXIT_DONE, EXIT_FAILED, UserError
from ..base.files import is_storage_failure
from .arguments import AsJson, Overrides
from .environment import restart_with_allocator_settings, world_of_launcher
from .output import console, note, print_json, stdout_for_results

if TYPE_CHECKING:
    from ..training.config import RunConfig

SECONDS_FOR_RANK_0 = 5

Out = Annotated[Path | None, typer.Option(help="folder to write to")]


def register(app: typer.Typer) -> None:
    """Add the verbs of this file."""
    data_app = typer.Typer(help="Prepare training text.", no_args_is_help=True)
    data_app.command("prepare")(prepare)
    data_app.command("tasks")(tasks)
    app.command("doctor")(doctor)
    app.add_typer(data_app, name="data")
    app.command("train")(train)


def doctor(
    cluster: Annotated[
        bool, typer.Option("--cluster", help="compare the hosts of all ranks; start it under srun, torchrun or mpirun")
    ] = False,
    out: Annotated[Path, typer.Option(help="with --cluster: folder that runs will be written to")] = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Tell whether this machine, or these hosts together, can run moescale, and what to do if not."""
    if cluster:
        _doctor_of_cluster(out, as_json)
    from .doctor import as_json as to_json
    from .doctor import examine, missing, table

    findings = examine()
    if as_json:
        print_json(to_json(findings))
    else:
        console().print(table(findings))
    raise typer.Exit(EXIT_FAILED if missing(findings) else EXIT_DONE)


def _doctor_of_cluster(out: Path, as_json: bool) -> NoReturn:
    """Every rank ends with the same exit code; rank 0 tells."""
    rank, _ = world_of_launcher()
    with stdout_for_results():
        from ..data.cache import data_root
        from ..parallel.failure import LostRank
        from .cluster_doctor import examine_cluster

        try:
            ok, findings = examine_cluster(out.resolve(), data_root(None))
        except LostRank as lost:
            note(f"failed (rank {rank}): {lost}")
            raise typer.Exit(EXIT_FAILED) from None
    if findings is not None:
        from .cluster_table import table

        if as_json:
            print_json(findings.as_json())
        else:
            console().print(table(findings))
    raise typer.Exit(EXIT_DONE if ok else EXIT_FAILED)


def prepare(
    file: Annotated[Path, typer.Argument(metavar="DATA.yaml", help="a YAML file with a data section")],
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Tokenize and index the text that a file's data section names."""
    from .. import data

    content = apply_overrides(load_yaml(file), overrides or [])
    if "data" not in content:
        raise UserError(f"{file}: has no data section")
    config = validate(data.DataConfig, content["data"], f"{file}: data")
    with stdout_for_results():
        prepared = data.prepare(config, progress=not as_json)
    summary: dict[str, Any] = {
        "folder": str(prepared.folder),
        "data_hash": prepared.data_hash,
        "tokenizer_hash": prepared.tokenizer_hash,
        "vocab_size": prepared.vocab_size,
        "train_tokens": prepared.train_tokens,
    }
    if as_json:
        print_json({**summary, "manifest": prepared.manifest})
    else:
        for key, value in summary.items():
            print(f"{key}: {value}")


def tasks(
    file: Annotated[Path, typer.Argument(metavar="RUN.yaml", help="a run file, or the config.yaml of a run's folder")],
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="folder to write to")] = Path("tasks"),
    as_json: AsJson = False,
) -> None:
    """Write the questions of a run's downstream tasks, for lm-evaluation-harness and for reading."""
    from ..data.tasks import questions_of, write_for_harness
    from ..training.config import load_run

    config = load_run(file, overrides)
    if not config.eval.tasks:
        raise UserError(f"{file}: eval.tasks names no task; see docs/downstream.md")
    with stdout_for_results():
        from ..compat.cuda_standin import install

        install()  # before Megatron, which reads the tokens, is imported
        from .. import data

        found = questions_of(config.eval.tasks, data.prepare(config.data, progress=not as_json))
    written = []
    for questions in found:
        try:
            lines, task = write_for_harness(out, questions)
        except OSError as error:
            if is_storage_failure(error):
                raise
            raise UserError(f"--out ({out}): cannot be written: {error.strerror}; name another folder") from None
        count, chance = len(questions.content), questions.chance
        written.append(
            {"task": questions.name, "questions": count, "chance": chance, "hash": questions.hash, "file": str(lines),
             "harness": str(task)}
        )  # fmt: skip
        if not as_json:
            print(f"{questions.name}: {count} questions, {chance:.1%} by chance: {lines}, {task}")
    if as_json:
        print_json({"tasks": written})


def train(
    file: Annotated[Path, typer.Argument(metavar="RUN.yaml", help="a run file")],
    overrides: Overrides = None,
    out: Out = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show what the run would cost, and stop")] = False,
    as_json: AsJson = False,
) -> None:
    """Train one model, alone or as one rank of torchrun, srun or mpirun; goes on with what the folder holds."""
    if not dry_run:
        restart_with_allocator_settings()
    from ..training.config import load_run

    rank, world = world_of_launcher()
    try:
        config = load_run(file, overrides)
        config.check_layout(world)
    except UserError:
        if rank != 0:
            # Usually every rank finds the same, rank 0 says it, and its launcher ends the others, this one during its
            # sleep. The first to end would have the launcher end rank 0 before it spoke.
            time.sleep(SECONDS_FOR_RANK_0)
        raise
    folder = out if out is not None else Path("runs") / config.name
    if dry_run:
        if rank == 0:
            _show_plan(config, world, as_json)
        return
    with stdout_for_results():
        from ..training.run import train as train_rank

        code = train_rank(config, folder, quiet=as_json)
    if rank == 0:
        _summarize(folder, code, as_json)
    raise typer.Exit(code)


def _show_plan(config: "RunConfig", world: int, as_json: bool) -> None:
    from .plan import plan_runs
    from .plan_table import render

    plan = plan_runs([("moe" if config.moe else "dense", config)], workers=1, world=world)
    if as_json:
        print_json(plan.as_json())
    else:
        console().print(render(plan))
        for warning in plan.warnings:
            note(f"warning: {warning}")


def _summarize(folder: Path, code: int, as_json: bool) -> None:
    """How the run ended, from what it wrote."""
    from ..scaling.record import read_record
    from ..training.status import read_status

    status = read_status(folder)
    if status is None:
        raise RuntimeError(f"{folder}: the run ended without a status")
    last = read_record(folder).steps[-1:]
    loss = last[0]["loss"] if last else None
    if as_json:
        print_json(
            {
                "folder": str(folder),
                "exit_code": code,
                "state": status.state,
                "reason": status.reason,
                "step": status.step,
                "steps_total": status.steps_total,
                "attempt": status.attempt,
                "loss": loss,
            }
        )
        return
    said = f"{status.state}: step {status.step} of {status.steps_total}"
    said += f", loss {loss:.4f}" if loss is not None else ""
    print(f"{said}{f' ({status.reason})' if status.reason else ''}, in {folder}")
