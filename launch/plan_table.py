"""A plan, and what checking its layouts showed, as tables for a terminal."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from ..base.progress import duration, memory, short
from .planned import Plan

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
