"""A plan, and what checking its layouts showed, as tables for a terminal."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from ..base.progress import duration, memory, short
from .planned import Plan, PlanRow

if TYPE_CHECKING:
    from .check_layout import LayoutCheck  # it imports torch


def render(plan: Plan) -> Table:
    """A row for each run; those that are impossible come last, their reasons are among the plan's warnings."""
    total = (
        f"{len(plan.rows)} runs, {plan.workers} at a time: about {duration(plan.seconds)}, {memory(plan.memory_bytes)}"
    )
    if plan.impossible:
        total += f"; {len(plan.impossible)} impossible"
    checks = any(row.check for row in plan.rows)
    table = Table(caption=total, caption_justify="left")
    for heading in ("run", "family", *(["check"] if checks else [])):
        table.add_column(heading, no_wrap=True)
    for heading in ("N total", "N active", "tokens", "steps", "FLOPs", "ranks", "memory", "time"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in plan.rows:
        table.add_row(
            row.name,
            row.family,
            *([row.check] if checks else []),
            short(row.n_total),
            short(row.n_active),
            short(row.tokens),
            str(row.steps),
            f"{row.flops:.3g}",
            str(row.layout["world"]),
            memory(row.memory_bytes),
            duration(row.seconds),
        )
    for run in plan.impossible:
        table.add_row(run.name, run.family, *([""] if checks else []), "impossible")
    return table


def render_placed(plan: Plan) -> Table:
    """A row for each run of a study on a cluster, with the layout chosen and what bounds it."""
    hours = sum(row.speed.device_hours for row in plan.rows if row.speed is not None)
    total = f"{len(plan.rows)} runs: {short(hours)} device-hours; the longest takes {duration(plan.seconds)}"
    if plan.impossible:
        total += f"; {len(plan.impossible)} impossible"
    table = Table(caption=total, caption_justify="left")
    table.add_column("run", overflow="fold", min_width=16)
    for heading in ("N total", "active", "tokens", "FLOPs", "ranks"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("layout", min_width=12)
    for heading in ("memory", "MFU", "hours x\nranks"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("time", justify="right", min_width=7)
    table.add_column("bound by", min_width=12)
    for row in plan.rows:
        if row.speed is None:
            raise RuntimeError(f"{row.name} was planned without a cluster")
        table.add_row(
            row.name,
            short(row.n_total),
            short(row.n_active),
            short(row.tokens),
            f"{row.flops:.3g}",
            str(row.layout["world"]),
            layout_in_short(row),
            memory(row.memory_bytes),
            f"{row.speed.mfu:.0%}",
            short(round(row.speed.device_hours, 2)),
            duration(row.seconds),
            f"{row.speed.bound} ({row.speed.shares[row.speed.bound]:.0%})",
        )
    for run in plan.impossible:
        table.add_row(run.name, "impossible")
    return table


def layout_in_short(row: PlanRow) -> str:
    """TP4 PP8 VP5 EP8 DP16 mb2 recompute, without what is 1 or as usual."""
    sizes = {"TP": "tensor", "PP": "pipeline", "VP": "virtual_stages", "EP": "expert", "DP": "data"}
    words = [f"{name}{row.layout[size]}" for name, size in sizes.items() if row.layout[size] > 1]
    words += [f"mb{row.micro_batch}"] if row.layout["world"] > 1 else []
    return " ".join([*words, *(["recompute"] if row.recompute else [])]) or "1 rank"


def render_checks(checks: "Sequence[LayoutCheck]") -> Table:
    """A row for each distinct layout; ``memory`` is the fullest rank's."""
    table = Table()
    table.add_column("layout of", no_wrap=True)
    sizes = ("world", "tensor", "pipeline", "data", "expert")
    headings = ("ranks", "tensor", "pipeline", "data", "expert", "tensors", "parameters", "fullest rank", "holds")
    for heading in (*headings, "memory", "checked in", "verdict"):
        table.add_column(heading, justify="right", no_wrap=True)
    for check in checks:
        more = f" and {len(check.runs) - 1} more" if len(check.runs) > 1 else ""
        table.add_row(
            check.runs[0] + more,
            *(str(check.layout[size]) for size in sizes),
            str(check.tensors),
            short(check.parameters),
            str(check.fullest_rank),
            short(check.parameters_held),
            memory(check.memory_bytes),
            duration(check.seconds),
            f"{len(check.faults)} faults" if check.faults else "whole",
        )
    return table
