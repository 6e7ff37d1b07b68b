"""A plan as a table for a terminal."""

from rich.table import Table

from ..base.progress import duration, memory, short
from .planned import Plan


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
