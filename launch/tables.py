"""Results as tables and text for a terminal."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

if TYPE_CHECKING:  # scipy takes a second, and a status needs none of it
    from ..scaling.fit import Fit
    from ..training.status import Status


def fit_table(result: "Fit") -> Table:
    """Coefficients with their intervals, and how good the fit is."""
    quality = [f"{result.n_points} points", f"rmse {result.rmse_log:.3%} of the loss"]
    quality.append(f"{result.agreeing} of {result.tried} starts agree")
    if result.held_out is not None:
        quality.append(f"held out: {result.held_out.n} points, rmse {result.held_out.rmse_log:.3%}")
    table = Table(title=str(result.conventions["equation"]), caption="; ".join(quality), caption_justify="left")
    table.add_column("coefficient")
    for heading in ("value", "95 % from", "to"):
        table.add_column(heading, justify="right")
    for name, estimate in result.coefficients.items():
        value = "undetermined" if estimate.value is None else f"{estimate.value:.4g}"
        table.add_row(name, value, *("" if end is None else f"{end:.4g}" for end in (estimate.low, estimate.high)))
    return table


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


def status_table(rows: Sequence[tuple[str, "Status | None"]]) -> Table:
    """State of each run of a study."""
    table = Table()
    table.add_column("run", no_wrap=True)
    table.add_column("state")
    table.add_column("step", justify="right")
    table.add_column("attempt", justify="right")
    table.add_column("reason", overflow="fold")
    for name, status in rows:
        if status is None:
            table.add_row(name, "pending", "", "", "")
        else:
            step = f"{status.step} / {status.steps_total}"
            table.add_row(name, status.state, step, str(status.attempt), status.reason or "")
    return table
