"""What runs will cost, before anything starts."""

from collections.abc import Iterable, Sequence

import psutil

from ..base.errors import UserError
from ..models.cost.rates import Cost
from ..models.counts import count_parameters, flops_per_token
from ..training.budget import cost_of, steps_of, tokens_per_step
from ..training.config import RunConfig
from ..training.schedule import check_schedule
from .branches import own_steps
from .environment import cores, cuda_devices
from .expansion import shared_complaints
from .layout_choice import Choice
from .layout_options import smallest_world
from .plan_warnings import memory_warnings, routing_warnings, runs_warnings, study_warnings
from .planned import Expansion, ImpossibleRun, Plan, PlannedRun, PlanRow, Speed
from .study_config import StudyConfig
from .vocabularies import Vocabularies

# What a forked run holds for itself of the libraries that it shares with its parent.
PROCESS_BYTES = 200 << 20
# Complaints shown where nothing can be run.
_SHOWN = 20


def plan_study(study: StudyConfig, expansion: Expansion, world: int | None = 1) -> Plan:
    """Plan the runs of a study; those that cannot start are listed as impossible.

    Args:
        world: ranks of each run; None: as few as its layout needs.

    Raises:
        UserError: no run of the study, or none of a group for one and the same reason, can start. Says why.
    """
    rows, refused = _plan(expansion.runs, world)
    impossible = sorted((*expansion.impossible, *refused), key=lambda run: run.name)
    _refuse_faults(study, expansion, impossible)
    if any(row.speed is not None for row in rows):  # elsewhere: all side by side, as far as Slurm lets them
        plan = Plan(tuple(rows), tuple(impossible), len(rows), ())
    else:
        plan = _with_workers(rows, impossible, study.workers)
    plan = plan.warning(runs_warnings(plan))
    configs = {run.name: run.config for run in expansion.runs}
    return plan.warning([*expansion.warnings, *study_warnings(study, rows, [configs[row.name] for row in rows])])


def plan_placed(expansion: Expansion) -> Plan:
    """Plan models that `placing.placed` has laid out and that belong to no study.

    Raises:
        UserError: none of them fits the cluster. Says why.
    """
    rows, refused = _plan(expansion.runs, None)
    impossible = (*expansion.impossible, *refused)
    if not rows:
        raise _nothing_possible(impossible)
    return Plan(tuple(rows), impossible, len(rows), ()).warning(f"{one.name}: {one.reason}" for one in impossible)


def plan_runs(runs: Sequence[tuple[str, RunConfig]], workers: int | None = None, world: int = 1) -> Plan:
    """Plan runs given as (family, configuration), ``world`` ranks each.

    ``workers`` None: as many as cores, or CUDA devices where there are any, and available memory carry.

    Raises:
        UserError: runs that cannot start: a budget below one batch, a layout that does not fit. Names them all.
    """
    rows, refused = _plan([PlannedRun(config.name, family, (), config) for family, config in runs], world)
    if refused:
        raise _nothing_possible(refused)
    plan = _with_workers(rows, (), workers)
    return plan.warning([*runs_warnings(plan), *routing_warnings([config for _, config in runs])])


def _plan(runs: Iterable[PlannedRun], world: int | None) -> tuple[list[PlanRow], list[ImpossibleRun]]:
    vocabularies = Vocabularies()
    rows, refused = [], []
    for run in runs:
        try:
            rows.append(_row(run, vocabularies.of(run.config.data), world))
        except UserError as error:
            refused.append(ImpossibleRun(run.name, run.family, run.groups, tuple(str(error).splitlines())))
    return rows, refused


def _row(run: PlannedRun, vocab: int, world: int | None) -> PlanRow:
    config, choice = run.config, run.choice
    if choice is not None:
        topology = config.check_layout(choice.world, choice.node_ranks)
    else:
        topology = config.check_layout(smallest_world(config.parallel) if world is None else world)
    steps = steps_of(config, vocab)
    check_schedule(config, steps)
    tokens = steps * tokens_per_step(config)
    counts = count_parameters(config.model, config.moe, vocab)
    flops = flops_per_token(config.model, config.moe, vocab, config.training.seq)
    if choice is None:
        cost = cost_of(config, vocab, topology)
    else:
        cost = Cost(choice.memory_bytes, choice.step.seconds * steps)
    seconds = cost.seconds * own_steps(config, steps) / steps
    return PlanRow(
        name=run.name,
        family=run.family,
        check=run.check,
        trunk=run.trunk,
        config_hash=config.config_hash,
        n_total=counts.total,
        n_active=counts.active,
        tokens=tokens,
        flops=float(flops.total * tokens),
        steps=steps,
        own_steps=own_steps(config, steps),
        layout=topology.describe(),
        memory_bytes=cost.memory_bytes,
        seconds=seconds,
        micro_batch=config.micro_batch(topology),
        recompute=config.training.recompute == "full",
        speed=None if choice is None else _speed(choice, seconds),
    )


def _speed(choice: Choice, seconds: float) -> Speed:
    return Speed(
        device_hours=seconds * choice.world / 3600,
        step_seconds=choice.step.seconds,
        mfu=choice.flops_share,
        bound=choice.step.bound,
        shares=choice.step.shares,
        chosen=choice.chosen,
        runner_up=choice.runner_up,
        runner_up_slower=choice.slower,
    )


def _refuse_faults(study: StudyConfig, expansion: Expansion, impossible: Sequence[ImpossibleRun]) -> None:
    """What stops every run of the study, or every run of a group for the same reason, is the study file's fault."""
    if len(impossible) == len(expansion.runs) + len(expansion.impossible):
        raise _nothing_possible(impossible)
    refused = {run.name for run in impossible}
    possible = {group for run in expansion.runs if run.name not in refused for group in run.groups}
    for name in study.groups:
        runs = [run for run in impossible if name in run.groups]
        if name not in possible and (faults := shared_complaints(runs)):
            raise UserError("\n".join(f"groups.{name}: {runs[0].name}: {fault}" for fault in faults))


def _nothing_possible(runs: Sequence[ImpossibleRun]) -> UserError:
    if len(runs) > 1 and (faults := shared_complaints(runs)):
        return UserError("\n".join(f"none of {len(runs)} runs can start: {fault}" for fault in faults))
    more = [f"and {len(runs) - _SHOWN} more runs"] if len(runs) > _SHOWN else []
    return UserError("\n".join([*(f"{run.name}: {run.reason}" for run in runs[:_SHOWN]), *more]))


def _with_workers(rows: Sequence[PlanRow], impossible: Sequence[ImpossibleRun], workers: int | None) -> Plan:
    if workers is None:
        largest = max((row.memory_bytes for row in rows), default=0)
        fitting = psutil.virtual_memory().available // (largest + PROCESS_BYTES)
        workers = max(min(len(cuda_devices()) or cores(), fitting, len(rows)), 1)
    plan = Plan(tuple(rows), tuple(impossible), workers, ())
    return plan.warning(memory_warnings(plan))
