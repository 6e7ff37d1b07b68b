"""Results as tables and text for a terminal."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from ..base.progress import duration

if TYPE_CHECKING:  # numpy and scipy take a second, and a status needs none of it
    from ..scaling.page import Block
    from .predictions import Entry
    from .slurm.states import RunState


def plain_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Text in columns; cells that are too long go on in the next line."""
    table = Table()
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def block_tables(blocks: Iterable["Block"]) -> list[Table | str]:
    """What a report's blocks say in tables and sentences, for a terminal."""
    from ..scaling import page

    found: list[Table | str] = []
    for block in blocks:
        if isinstance(block, page.Table):
            found.append(plain_table(block.columns, block.rows))
        elif isinstance(block, page.Points):
            found += block.texts
        elif isinstance(block, page.Heading | page.Text):
            found.append(block.text)
    return found


def prediction_text(prediction: Mapping[str, Any]) -> str:
    """A prediction, a line each, and its warnings."""
    lines = []
    for name, value in prediction.items():
        if isinstance(value, dict):
            between = "" if value["low"] is None else f"  (95 %: {value['low']:.5g} to {value['high']:.5g})"
            lines.append(f"{name}: {value['value']:.5g}{between}")
        elif name != "warnings":
            lines.append(f"{name}: {value:.5g}" if isinstance(value, float) else f"{name}: {value}")
    return "\n".join([*lines, *(f"warning: {text}" for text in prediction["warnings"])])


def registered_text(entry: "Entry") -> str:
    """A registered prediction, and its warnings."""
    found = entry.prediction
    ends = f"95 %: {found.loss.low:.4f} to {found.loss.high:.4f}"
    lines = [
        f"{found.run}: loss {found.loss.value:.4f} ({ends}) by {found.law}, registered in {entry.register} "
        f"({entry.hash[:12]})"
    ]
    if found.after:
        lines.append("  its loss was known already: the register says so")
    return "\n".join([*lines, *(f"  warning: {text}" for text in found.warnings)])


def status_table(states: Sequence["RunState"]) -> Table:
    """State of each run of a study; below a failed one the last lines of its log."""
    counts = Counter(state.state for state in states)
    table = Table(caption=", ".join(f"{count} {state}" for state, count in counts.items()), caption_justify="left")
    with_jobs = any(state.job for state in states)
    table.add_column("run", no_wrap=True)
    table.add_column("state")
    for heading in ("step", "loss", "left", "attempt"):
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in ("job", "nodes") if with_jobs else ():
        table.add_column(heading, no_wrap=True)
    table.add_column("reason", overflow="fold")
    for state in states:
        reason = "\n".join([state.reason, *(f"  {line}" for line in state.log_tail)])
        table.add_row(
            state.name,
            state.state,
            f"{state.step} / {state.steps_total}" if state.steps_total else "",
            f"{state.loss:.3f}" if state.loss is not None else "",
            duration(state.left) if state.left is not None else "",
            str(state.attempt or ""),
            *([state.job, state.nodes] if with_jobs else []),
            Text(reason),
        )
    return table
